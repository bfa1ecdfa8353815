"""What a run shows is also in its folder, with the time, also where nobody sees it."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path

import pytest
from rich.console import Console

from sdpg_megatron.errors import RolloutError
from sdpg_megatron.observe import run_log
from sdpg_megatron.observe.progress import Progress
from sdpg_megatron.observe.run_log import LOG_FILE, OLDER_LOG_FILE, RunLog


def lines(run_dir: Path) -> list[str]:
    """Without their times."""
    found = (run_dir / LOG_FILE).read_text().splitlines()
    return [re.sub(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} ", "", line) for line in found]


def test_progress_warnings_and_the_error_are_logged(tmp_path: Path) -> None:
    progress = Progress(3, console=Console(file=io.StringIO()))
    progress.message("before")
    with pytest.raises(RolloutError), RunLog(tmp_path):
        progress.message("[begins]")
        logging.getLogger("sdpg_megatron.rollout").warning("a server is lost")
        raise RolloutError("no server is left")
    progress.message("after")
    with pytest.raises(ZeroDivisionError), RunLog(tmp_path):
        raise ZeroDivisionError
    assert lines(tmp_path)[:4] == [
        "INFO [begins]",
        "WARNING a server is lost",
        "ERROR RolloutError: no server is left",
        "ERROR ended by an error",
    ]
    assert lines(tmp_path)[-1] == "ZeroDivisionError"


def test_other_ranks_and_a_refusing_disk_log_nothing_and_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / LOG_FILE).mkdir()
    with RunLog(tmp_path):
        Progress(3, enabled=False).message("another rank")
        Progress(3, console=Console(file=io.StringIO())).message("refused")
    assert capsys.readouterr() == ("", "")


def test_a_long_log_is_put_aside_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "LIMIT", 40)
    progress = Progress(3, console=Console(file=io.StringIO()))
    for call in ("first", "second", "third"):
        with RunLog(tmp_path):
            progress.message(f"the {call} call")
    assert lines(tmp_path) == ["INFO the third call"]
    assert "the second call" in (tmp_path / OLDER_LOG_FILE).read_text()
