"""Fixtures and marks for the whole suite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.pool import RankPool

hypothesis.settings.register_profile("suite", deadline=None)  # no test may depend on how busy the machine is
hypothesis.settings.load_profile("suite")
DIST = Path(__file__).parent / "dist"


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Up to four Gloo ranks: `ranks.run(function, world_size, *args)` gives each rank's result."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.hookimpl(tryfirst=True)  # pytest-xdist then reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(group_of(item)))
    without_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if DIST in item.path.parents:
            item.add_marker(pytest.mark.dist)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(without_gpu)


def group_of(item: pytest.Item) -> str:
    """Which tests one worker of pytest-xdist takes: a file's share what they set up, and there is one set of ranks."""
    fixtures = getattr(item, "fixturenames", ())
    return "ranks" if DIST in item.path.parents or "ranks" in fixtures else str(item.path)
