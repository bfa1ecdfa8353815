"""Metrics writers of the user's: they get every record; classes that do not fit are refused before a run starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdpg_megatron.config import RunConfig
from sdpg_megatron.config.load import load_config
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.observe.writers import find_writer, open_external, open_writers, read_metrics

ROOT = Path(__file__).parents[2]
WRITER = """
class Writer:
    def __init__(self, config):
        self.file = open(config.run_dir / "mine.txt", "a")
    def write(self, step, values):
        self.file.write(f"{step} {values['reward/mean']}\\n")
    def close(self):
        self.file.close()
class Failing(Writer):
    def __init__(self, config):
        raise RuntimeError("no network")
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    (tmp_path / "own_writer.py").write_text(WRITER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    overrides = ["model.path=m", f"run_dir={tmp_path / 'run'}"]
    return load_config(ROOT / "examples" / "smollm2" / "addition.yaml", overrides)


def test_it_gets_every_record(config: RunConfig) -> None:
    config.run_dir.mkdir()
    writer = open_writers(config.run_dir, [open_external("own_writer:Writer", config)])
    for step in (1, 2):
        writer.write(step, {"reward/mean": step / 2})
    writer.close()
    assert (config.run_dir / "mine.txt").read_text() == "1 0.5\n2 1.0\n"
    assert [record["step"] for record in read_metrics(config.run_dir / "metrics.jsonl")] == [1, 2]


def test_one_that_does_not_fit_is_refused(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"writers: found 'own_writer:Failing', .*no network"):
        open_external("own_writer:Failing", config)
    with pytest.raises(ConfigError, match=r"writers: .*did you mean 'Writer'"):
        find_writer("own_writer:Writr")
    with pytest.raises(ConfigError, match=r"writers: .*write\(step, values\)"):
        find_writer("collections:Counter")


def records(log: Path) -> bytes:
    """The records of an offline W&B log, which is in LevelDB's format: records are split at the ends of blocks."""
    data, found, at = log.read_bytes(), b"", 7  # after the file's header
    while at + 7 <= len(data):
        if (rest := -at % 32_768) < 7:  # the end of a block has no room for a record's header
            at += rest
        length = int.from_bytes(data[at + 4 : at + 6], "little")
        found += data[at + 7 : at + 7 + length]
        at += 7 + length
    return found


def test_weights_and_biases_offline(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs wandb (pip install wandb)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config.run_dir.mkdir()
    for step in (1, 2):  # the second continues the first
        writer = open_external("examples.wandb_writer:WandbWriter", config)
        writer.write(step, {"reward/mean": step / 2})
        writer.close()
    logs = list(config.run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(logs) == 2 and all(b"reward/mean" in records(log) for log in logs)
    assert len({log.name for log in logs}) == 1, "one run id"
