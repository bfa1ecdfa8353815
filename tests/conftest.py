"""Fixtures and marks for the whole suite."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import torch

from tests.pool import RankPool
from tests.slow import SLOW

if TYPE_CHECKING:
    from tests.e2e.machines import Machines

hypothesis.settings.register_profile("suite", deadline=None)  # no test may depend on how busy the machine is
hypothesis.settings.load_profile("suite")
DIST = Path(__file__).parent / "dist"
RANKS = ("tests/dist/", "tests/host/", "tests/unit/test_benchmark_head.py")
"""What uses `ranks`: there is one set of them."""


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Up to four Gloo ranks: `ranks.run(function, world_size, *args)` gives each rank's result."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    """Two hosts with a link between them; skips the test where none can be made."""
    from tests.e2e.hosts import two_hosts, why_not
    from tests.e2e.machines import Machines

    if reason := why_not():
        pytest.skip(reason)
    with two_hosts() as (first, second, link):
        yield Machines((first, second), link, tmp_path)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also run the slow tests of tests/slow.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    without_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if DIST in item.path.parents:
            item.add_marker(pytest.mark.dist)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(without_gpu)
        if any(fnmatchcase(item.nodeid, pattern) for pattern in SLOW):
            item.add_marker(pytest.mark.slow)
    if not config.getoption("--all"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """How pytest-xdist shares the tests out: a file's to one worker, as they share what they set up."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, _ = nodeid.partition("::")
            return "ranks" if file.startswith(RANKS) else file

    return ByFile(config, log)
