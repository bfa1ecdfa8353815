"""Standard streams that are closed, full or gone: one line or nothing, and never a traceback."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from sdpg_megatron.errors import OutputError
from sdpg_megatron.process.streams import OutputStream


class Pipe:
    """A standard output whose reader can end."""

    def __init__(self) -> None:
        self.reader, self.descriptor = os.pipe()
        self.file = os.fdopen(self.descriptor, "w")

    def end(self) -> None:
        os.close(self.reader)


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipe]:
    pipe = Pipe()
    monkeypatch.setattr("sdpg_megatron.process.streams.NAMES", {pipe.descriptor: "standard output"})
    yield pipe
    pipe.file.close()


def test_a_strict_stream_raises_once(pipe: Pipe) -> None:
    stream = OutputStream(pipe.file, pipe.descriptor, strict=True)
    stream.write("read")
    stream.flush()
    assert os.read(pipe.reader, 9) == b"read"
    pipe.end()
    stream.write("lost")
    with pytest.raises(OutputError, match=r"^standard output: found Broken pipe, expected .* Fix: redirect") as caught:
        stream.flush()
    assert caught.value.reader_ended
    stream.write("more")
    stream.flush()
    assert stream.lost == "Broken pipe"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", "\\xef\\u4e16\\udcff"), ("latin-1", "\xef\\u4e16\\udcff"), ("utf-8", "\xef\u4e16\\udcff")],
)
def test_characters_that_the_encoding_lacks_are_escaped(encoding: str, shown: str) -> None:
    written = io.BytesIO()
    stream = OutputStream(io.TextIOWrapper(written, encoding=encoding), 2, strict=False)
    stream.write("\xef\u4e16\udcff")
    stream.flush()
    assert written.getvalue().decode(encoding) == shown


def test_an_encoding_that_takes_nothing_is_lost_output() -> None:
    stream = OutputStream(io.TextIOWrapper(io.BytesIO(), encoding="undefined"), 1, strict=True)
    with pytest.raises(OutputError, match="undefined encoding"):
        stream.write("x")


def test_what_is_lost_goes_to_the_fallback(pipe: Pipe, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What was buffered, what is written later, and what others write to the descriptor, such as C libraries."""
    stream = OutputStream(pipe.file, pipe.descriptor, strict=True)
    stream.keep_going(tmp_path / "logs" / "err")
    pipe.end()
    stream.write("buffered\n")
    stream.flush()
    stream.write("later\n")
    stream.flush()
    os.write(pipe.descriptor, b"from C\n")
    assert (tmp_path / "logs" / "err").read_text() == "buffered\nlater\nfrom C\n"
    assert caplog.messages == ["standard output is lost (Broken pipe)"]


def test_a_fallback_may_come_after_the_loss_and_need_not_be_there(pipe: Pipe, tmp_path: Path) -> None:
    stream = OutputStream(pipe.file, pipe.descriptor, strict=False)
    pipe.end()
    stream.write("lost\n")
    stream.flush()
    (tmp_path / "file").touch()
    stream.keep_going(tmp_path / "file" / "err")
    stream.write("lost as well\n")
    stream.flush()
    stream.keep_going(tmp_path / "err")
    stream.write("kept\n")
    stream.flush()
    assert (tmp_path / "err").read_text() == "kept\n"


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_a_stream_that_was_closed_or_is_none(stream: TextIO | None) -> None:
    if stream is not None:
        stream.close()
    guarded = OutputStream(stream, 1, strict=True)
    with pytest.raises(OutputError, match=r"Bad file descriptor|closed file"):
        guarded.write("x")
    guarded.write("x")
    guarded.flush()
    assert not guarded.isatty()


# Commands


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    script = line.replace("SDPG", f"{sys.executable} -m sdpg_megatron")
    return subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("SDPG --version >&-", "Bad file descriptor"),
        ("SDPG --help > /dev/full", "No space left on device"),
    ],
)
def test_output_that_cannot_be_written_is_one_error(line: str, reason: str, tmp_path: Path) -> None:
    found = shell(line, tmp_path)
    assert found.returncode == 2
    assert found.stderr == (
        f"OutputError: standard output: found {reason}, expected a stream that can be written. Fix: redirect it "
        "elsewhere\n"
    )


def test_a_reader_that_has_ended_is_no_error(tmp_path: Path) -> None:
    found = shell("(SDPG --help; echo $? > code) | true; cat code", tmp_path)
    assert (found.stdout, found.stderr) == (f"{128 + signal.SIGPIPE}\n", "")


def test_without_any_stream_the_exit_code_tells(tmp_path: Path) -> None:
    found = shell("SDPG train nothing.yaml 0<&- >&- 2>&-", tmp_path)
    assert (found.returncode, found.stdout, found.stderr) == (2, "", "")


def test_a_name_that_the_encoding_lacks_is_escaped(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode("\u4e16".encode() + b"\xff")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    found = shell(f"PYTHONIOENCODING=ascii SDPG inspect {tmp_path}/*; echo $?", tmp_path)
    assert "\\u4e16\\udcff" in found.stdout and found.stdout.endswith("\n2\n"), found
    assert "Traceback" not in found.stderr
