"""What a run writes and shows: metrics, events, progress, learning curve, summary."""

from __future__ import annotations

import io
import json
import math
import re
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from sdpg_megatron.errors import CheckpointError, DataError, WriteError
from sdpg_megatron.observe import byte_progress as transfers
from sdpg_megatron.observe.metrics import Metric, Reduction, join, merge, values
from sdpg_megatron.observe.progress import HEADER_EVERY, Progress, format_seconds
from sdpg_megatron.observe.report import GREEDY, KL, REWARD, SAMPLED, plot_learning_curve
from sdpg_megatron.observe.summary import Summary, read_summary, write_summary
from sdpg_megatron.observe.truncate import beyond, truncate_folders, truncate_lines
from sdpg_megatron.observe.writers import JsonlWriter, MultiWriter, open_writers, read_metrics, truncate_records

STEP = {
    "reward/mean": 0.40625,
    "distill/kl": 0.0831,
    "train/entropy": 1.25,
    "distill/gate_rate": 0.38,
    "rollout/length": 7.9,
    "speed/tokens_per_second": 1234.5,
}


# --- metrics


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(0, 50)), min_size=1, max_size=8), st.integers(0, 7))
def test_means_do_not_depend_on_the_split(parts: list[tuple[float, int]], cut: int) -> None:
    ranks = [{"m": Metric(value, weight=weight)} for value, weight in parts]
    at_once, in_two = merge(ranks), merge([merge(ranks[:cut]), merge(ranks[cut:])])
    tokens = [value for value, weight in parts for _ in range(weight)]
    assert at_once["m"].weight == in_two["m"].weight == len(tokens)
    if tokens:
        assert at_once["m"].value == pytest.approx(math.fsum(tokens) / len(tokens), abs=1e-9)
        assert in_two["m"].value == pytest.approx(at_once["m"].value, abs=1e-9)
    else:
        assert values(at_once) == {}


@pytest.mark.parametrize(("reduction", "want"), [(Reduction.SUM, 1.0), (Reduction.MAX, 3.0), (Reduction.MIN, -2.0)])
def test_other_reductions(reduction: Reduction, want: float) -> None:
    assert values(merge([{"m": Metric(3.0, reduction)}, {}, {"m": Metric(-2.0, reduction)}])) == {"m": want}


def test_two_reductions_of_one_metric_are_refused() -> None:
    with pytest.raises(ValueError, match="two reductions: sum and max"):
        join(Metric(1.0, Reduction.SUM), Metric(1.0, Reduction.MAX))


# --- writers


def test_every_line_is_there_at_once_and_is_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write(1, {"a": 0.5, "b": math.nan, "c": math.inf})
    assert path.read_text() == '{"step": 1, "a": 0.5, "b": null, "c": null}\n'
    writer.close()
    JsonlWriter(path).write(2, {"a": 0.25})
    assert [record["a"] for record in read_metrics(path)] == [0.5, 0.25]
    assert math.isnan(read_metrics(path)[0]["b"])


@pytest.mark.parametrize("line", ["hello", "[1]", "7", '{"a": 1}', '{"step": null}', '{"step": "x"}'])
def test_a_foreign_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n\n{line}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:3: found .*, expected a record.*Fix: remove the line"):
        read_metrics(path)


def test_a_blank_line_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n\n{"step": 1}\n')
    assert read_metrics(path) == [{"step": 0}, {"step": 1}]


@pytest.mark.parametrize(
    ("text", "step", "kept"),
    [
        ('{"step": 1}\n{"step": 2}\n{"step": 3}\n', 2, '{"step": 1}\n{"step": 2}\n'),
        ('{"step": 1}\n{"step": 2}\n', 5, '{"step": 1}\n{"step": 2}\n'),
        ('{"step": 1}\n{"step": 2, "rew', 5, '{"step": 1}\n'),
        ('{"step": 1}\n{"step": 2}', 5, '{"step": 1}\n'),
        ('{"step": 0}\n{"step": 1}\n', 0, '{"step": 0}\n'),
        ("", 3, ""),
        ('{"step": 1}\n\n{"step": 2}\n{"step": 3}\n', 2, '{"step": 1}\n\n{"step": 2}\n'),
        ('{"step": 1}\nhello\n{"step": 2}\n{"ste', 5, '{"step": 1}\nhello\n{"step": 2}\n'),
        ('{"step": 1}\n\nhello\n', 5, '{"step": 1}\n'),
        ('{"step": 1}\nhello\n{"step": 2}\n', 1, '{"step": 1}\n'),
        ('{"step": 1}\n{"step": 3}\nhello\n{"step": 2}\n', 2, '{"step": 1}\n'),
    ],
)
def test_resuming_cuts_what_will_be_written_again(tmp_path: Path, text: str, step: int, kept: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    truncate_lines(path, beyond(step, evaluated=True))
    assert path.read_text() == kept


@pytest.mark.parametrize(
    ("text", "step", "kept"),
    [
        ('{"step": 0, "eval/a": 1}\n', 0, ""),
        ('{"step": 1, "a": 1}\n{"step": 2, "a": 1, "eval/a": 1}\n', 2, '{"step": 1, "a": 1}\n'),
        ('{"step": 1, "a": 1}\n{"step": 2, "a": 1}\n', 2, '{"step": 1, "a": 1}\n'),
    ],
)
def test_so_is_a_step_whose_evaluation_will_be_made_again(tmp_path: Path, text: str, step: int, kept: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    truncate_lines(path, beyond(step, evaluated=False))
    assert path.read_text() == kept


def test_cutting_no_file_makes_none(tmp_path: Path) -> None:
    truncate_records(tmp_path, 3, evaluated=True)
    truncate_folders(tmp_path / "eval", 3, evaluated=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("evaluated", "left"), [(True, ["step_1", "step_2"]), (False, ["step_1"])])
def test_evaluations_that_will_be_made_again_are_removed(tmp_path: Path, evaluated: bool, left: list[str]) -> None:
    for name in ("step_1", "step_2", "step_10"):
        (tmp_path / name).mkdir()
    truncate_folders(tmp_path, 2, evaluated=evaluated)
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def events(run: Path) -> list[tuple[int, str]]:
    """What the event files hold, whoever would hide it."""
    found = []
    for path in sorted((run / "tensorboard").glob("events.*")):
        for event in EventFileLoader(str(path)).Load():
            found += [(event.step, value.tag) for value in event.summary.value]
    return found


def test_a_resumed_run_replaces_the_lost_steps_everywhere(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "demo"
    for resumed, steps, shift in ((0, (1, 2, 3), 0.0), (2, (3, 4), 100.0)):
        truncate_records(run, resumed, evaluated=True)
        writer = open_writers(run)
        for step in steps:
            writer.write(step, {"reward/mean": step + shift})
        writer.close()
    want = [(1, 1.0), (2, 2.0), (3, 103.0), (4, 104.0)]
    assert [(r["step"], r["reward/mean"]) for r in read_metrics(run / "metrics.jsonl")] == want
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
    assert events(run) == [(step, "reward/mean") for step in (1, 2, 3, 4)]
    accumulated = EventAccumulator(str(run / "tensorboard"))
    accumulated.Reload()
    assert [(e.step, e.value) for e in accumulated.Scalars("reward/mean")] == want


@pytest.mark.parametrize("half", [1, 9, 20])
def test_half_an_event_is_cut(tmp_path: Path, half: int) -> None:
    writer = open_writers(tmp_path)
    writer.write(1, {"a": 1.0})
    writer.close()
    (path,) = (tmp_path / "tensorboard").glob("events.*")
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:half])
    truncate_records(tmp_path, 1, evaluated=True)
    assert path.read_bytes() == whole


def test_closing_one_writer_may_fail_but_all_are_closed() -> None:
    class Writer:
        def __init__(self, fails: bool) -> None:
            self.fails, self.closed = fails, False

        def write(self, step: int, values: object) -> None: ...

        def close(self) -> None:
            self.closed = True
            if self.fails:
                raise OSError("disk full")

    writers = [Writer(False), Writer(True), Writer(False)]
    with pytest.raises(OSError, match="disk full"):
        MultiWriter(writers).close()
    assert all(writer.closed for writer in writers)


# --- progress

NOON = datetime(2026, 11, 24, 12)


def show(steps: range, *, terminal: bool = False, enabled: bool = True, done: int = 0, width: int = 60) -> str:
    """What a run of 30 steps, 10 s each, prints for `steps`. It took 100 s to start."""
    output = io.StringIO()
    now = [0.0]
    console = Console(file=output, force_terminal=terminal, width=width)
    progress = Progress(30, done=done, enabled=enabled, console=console, clock=lambda: now[0], now=lambda: NOON)
    now[0] += 100.0
    for step in steps:
        progress.phase("rollout")
        progress.count(3, 8)
        now[0] += 10.0
        progress.step(step, STEP | ({"eval/greedy_accuracy": 0.65} if step == 10 else {}))
    progress.message("[saved]")
    progress.close()
    return output.getvalue()


def test_a_log_gets_one_plain_unwrapped_line_per_step() -> None:
    header, first, *rest, last = show(range(1, 11)).splitlines()
    assert " ".join(header.split()) == "time step reward accuracy greedy KL entropy gate length tok/s left"
    assert " ".join(first.split()) == "2026-11-24 12:00:00 1/30 0.406 - - 0.0831 1.250 0.38 7.9 1,234 4:50"
    assert " ".join(rest[-1].split()[2:]) == "10/30 0.406 - 0.650 0.0831 1.250 0.38 7.9 1,234 3:20"
    assert {len(line) for line in (header, first, *rest)} == {100}
    assert len(rest) == 9
    assert last == "2026-11-24 12:00:00 [saved]"


def test_the_header_returns() -> None:
    lines = show(range(1, HEADER_EVERY + 2)).splitlines()
    assert [i for i, line in enumerate(lines) if "reward" in line] == [0, HEADER_EVERY + 1]


def test_a_terminal_gets_the_rows_and_a_bar() -> None:
    shown = show(range(1, 4), terminal=True)
    assert "rollout, 3/8 groups" in shown and "3/30" in shown and "4:30 left" in shown
    assert "\x1b[" in shown


@pytest.mark.parametrize(("width", "stamped"), [(99, False), (100, True)])
def test_a_narrow_terminal_gets_rows_without_the_time(width: int, stamped: bool) -> None:
    assert ("2026-11-24 12:00:00   1/30" in show(range(1, 2), terminal=True, width=width)) == stamped


def left(*parts: tuple[str, float], done: int = 0, recalled: float | None = None) -> list[str]:
    """The times left of a run of 10 steps with an evaluation after every fourth and the last, as it goes on.

    Parts are what takes seconds: "step", or the "eval" after one, which is told with it.
    """
    output, now, step = io.StringIO(), [0.0], done
    progress = Progress(
        10,
        done=done,
        evaluations=lambda step: len([s for s in (4, 8, 10) if s > step]),
        console=Console(file=output),
        clock=lambda: now[0],
    )
    progress.recall([{"step": 0, "time/eval": recalled}] if recalled is not None else [{"step": 0}])
    for number, (name, seconds) in enumerate(parts):
        progress.phase(name)
        now[0] += seconds
        step += name == "step"
        evaluated = name == "eval"
        if evaluated or number + 1 == len(parts) or parts[number + 1][0] == "step":
            progress.step(step, {"time/eval": seconds} if evaluated else {})
    progress.close()
    return [line.split()[-1] for line in output.getvalue().splitlines()[1:]]


def test_time_left_has_the_evaluations_to_come() -> None:
    steps = [("step", 10.0)] * 3
    assert left(("eval", 60.0), *steps, ("step", 10.0), ("eval", 60.0), ("step", 10.0)) == [
        "-", "4:30", "4:20", "4:10", "3:00", "2:50",
    ]  # fmt: skip
    assert left(*steps) == ["1:30", "1:20", "1:10"], "nothing is known of evaluations"
    assert left(("step", 10.0), done=8, recalled=30.0) == ["0:40"]
    assert left(("step", 10.0), ("step", 10.0), ("eval", 50.0), done=8, recalled=30.0) == ["0:40", "0:00"]


def test_time_left_counts_this_sessions_steps_only() -> None:
    assert show(range(21, 22), done=20).splitlines()[1].split()[-1] == "1:30"


def test_before_the_first_step_no_time_is_guessed() -> None:
    assert show(range(0, 1)).splitlines()[1].split()[-1] == "-"


@pytest.mark.parametrize("terminal", [False, True])
def test_other_ranks_are_silent(terminal: bool) -> None:
    assert show(range(1, 4), terminal=terminal, enabled=False) == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (7384, "2:03:04")]
)
def test_format_seconds(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text


# --- report and summary


def write_metrics(run_dir: Path, records: list[dict[str, float | None]]) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_learning_curve_shows_what_there_is(tmp_path: Path) -> None:
    rows: list[dict[str, float | None]] = [{"step": s, "reward/mean": s / 9, "distill/kl": None} for s in range(9)]
    write_metrics(tmp_path, [*rows, {"step": 9, "eval/greedy_accuracy": 0.8}, {"step": 9, "train/entropy": 1.0}])
    path = plot_learning_curve(tmp_path)
    assert path == tmp_path / "learning_curve.png"
    picture_HW3 = imread(path)[..., :3]
    assert min(picture_HW3.shape[:2]) > 600
    seen = {c for c in (REWARD, SAMPLED, GREEDY, KL) if (abs(picture_HW3 - to_rgb(c)) < 0.004).all(axis=-1).any()}
    assert seen == {REWARD, GREEDY}


def test_a_run_without_steps_has_an_empty_curve(tmp_path: Path) -> None:
    write_metrics(tmp_path, [])
    assert plot_learning_curve(tmp_path).exists()


def test_no_metrics_no_curve(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        plot_learning_curve(tmp_path)


def test_the_summary_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_summary(tmp_path) is None
    first = Summary(
        accuracy_before=0.05,
        accuracy_after=0.7,
        greedy_before=0.4,
        greedy_after=0.83,
        reward=0.5,
        steps=25,
        seconds=312.5,
    )
    path = write_summary(tmp_path, first)
    assert json.loads(path.read_text()) == {
        "accuracy_before": 0.05,
        "accuracy_after": 0.7,
        "greedy_before": 0.4,
        "greedy_after": 0.83,
        "reward": 0.5,
        "steps": 25,
        "seconds": 312.5,
    }
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed here")))
    with pytest.raises(WriteError, match="killed here"):
        write_summary(
            tmp_path,
            Summary(
                accuracy_before=None, accuracy_after=None, greedy_before=None, greedy_after=None, steps=1, seconds=1
            ),
        )
    assert read_summary(tmp_path) == first


@pytest.mark.parametrize("content", [b"\xfc{}", b"{", b"[]", b'{"steps": 3}', b'{"steps": "x"}', b"[" * 100_000])
def test_a_damaged_summary_says_what_to_do(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"summary.json: found .*Fix: remove it"):
        read_summary(tmp_path)


# --- transfers


@pytest.mark.parametrize("terminal", [False, True])
def test_a_transfer_says_how_much_time_is_left(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    """In a log by lines; on a terminal there is a bar."""
    monkeypatch.setattr(transfers, "EVERY", 0.0)
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=200)
    with transfers.transfer("a -> b", 4_000_000, console, passes=2) as moved:  # written, and read back
        moved(2_000_000)
        moved(6_000_000)
    lines = file.getvalue().splitlines()
    assert re.search(r"a -> b: 4 MB in \d+\.\d s", lines[-1])
    if not terminal:
        assert lines[:-1] == ["a -> b: 1 of 4 MB, 0:00:00 left", "a -> b: 4 of 4 MB, 0:00:00 left"]
