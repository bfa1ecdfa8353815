"""Tables and pictures of several runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.test_tools import tool

report = tool("report_comparison")


def write_run(folder: Path, name: str, seed: int, rewards: list[float], **final: float) -> None:
    """A finished run with one record a step."""
    run_dir = folder / name / f"seed_{seed}"
    run_dir.mkdir(parents=True)
    records = [{"step": step, "reward/mean": reward} for step, reward in enumerate(rewards, start=1)]
    records[-1] |= final
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run_dir / "summary.json").write_text("{}")


def test_a_table_has_the_mean_and_the_extremes_over_seeds(tmp_path: Path) -> None:
    for seed, accuracy in ((0, 0.5), (1, 0.25), (10, 0.75)):
        write_run(tmp_path, "grpo", seed, [0.0, 0.2, 0.4], **{"eval/sampled_accuracy": accuracy})
    write_run(tmp_path, "opsd", 0, [0.0], **{"eval/sampled_accuracy": 0.0, "distill/kl": 12.34})
    text = report.table(report.read_runs(tmp_path))
    grpo, opsd = text.splitlines()[2:]
    cells = [cell.strip() for cell in grpo.strip("|").split("|")]
    assert cells[:3] == ["grpo", "3", "0.500 (0.250 to 0.750)"]
    assert cells[4:7] == ["0.300", "0.200", "-"]  # of the last two steps, of all; no entropy was recorded
    assert "| 0.000 |" in opsd and "| 12.3 |" in opsd
    assert [run.seed for run in report.read_runs(tmp_path)["grpo"]] == [0, 1, 10]


def test_runs_that_are_not_finished_are_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, "grpo", 0, [0.5])
    write_run(tmp_path, "grpo", 1, [0.5])
    (tmp_path / "grpo" / "seed_1" / "summary.json").unlink()
    assert [run.seed for run in report.read_runs(tmp_path)["grpo"]] == [0]


def test_everything_is_written_the_sweep_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs", "sdpg_urkl", 0, [0.1, 0.5])
    write_run(tmp_path / "runs", "sdpg_beta_0.1", 0, [0.1, 0.25])
    assert report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"comparison.md", "comparison.json", "comparison.png", "beta.png"}
    shown = capsys.readouterr().out
    assert shown == (tmp_path / "out" / "comparison.md").read_text()
    methods, sweep = shown.split("\n\n")
    assert "sdpg_urkl" in methods and "sdpg_beta" not in methods
    assert "sdpg_beta_0.1" in sweep and "sdpg_urkl" not in sweep
    numbers = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert numbers["sdpg_beta_0.1"]["0"]["reward, all steps"] == pytest.approx(0.175)


def test_a_folder_without_finished_runs_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 1
    assert "expected finished runs" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
