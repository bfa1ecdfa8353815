"""What a run starts from is the same on all ranks, or an error."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdpg_megatron.config import ParallelConfig
from tests.pool import RankPool

pytestmark = pytest.mark.dist


def find(folders: list[Path], digests: list[str]) -> Any:
    from sdpg_megatron.errors import ConfigError
    from sdpg_megatron.mcore import parallel
    from sdpg_megatron.train.run_fingerprint import find_run_fingerprint

    ranks = parallel.initialize(ParallelConfig(), 0)
    config: Any = SimpleNamespace(model=SimpleNamespace(path=folders[ranks.rank]))
    prompts: Any = SimpleNamespace(digest=digests[ranks.rank])
    try:
        origin = find_run_fingerprint(config, prompts, ranks)
    except ConfigError as error:
        return str(error)
    return origin.model, origin.data


def test_machines_with_other_files_are_named(ranks: RankPool, tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes([number]))
    first, second = ranks.run(find, 2, [folders[0]] * 2, ["d", "d"])
    assert first == second and first[1] == "d"
    for told in ranks.run(find, 2, folders, ["d", "d"]):
        assert told.startswith("model.path: found ")
        assert f"expected {first[0]} on rank 1, as on rank 0" in told
    for told in ranks.run(find, 2, [folders[0]] * 2, ["d", "e"]):
        assert told.startswith("data: found 'e', expected d on rank 1, as on rank 0")
