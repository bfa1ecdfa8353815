"""Forks of the preloaded process stand for the real command in the tests beside this one."""

from __future__ import annotations

import psutil
import pytest

from tests.e2e.runs import environment, preloaded, run_module


@pytest.mark.parametrize("arguments", [["--version"], ["train", "nowhere.yaml"], ["trian"]], ids="".join)
def test_a_fork_says_what_the_command_says(arguments: list[str]) -> None:
    command, fork = (run_module("sdpg_megatron", *arguments, fresh=fresh) for fresh in (True, False))
    assert (fork.returncode, fork.stdout, fork.stderr) == (command.returncode, command.stdout, command.stderr)


def test_a_fork_that_takes_too_long_is_ended_and_the_next_is_none_the_worse() -> None:
    process = preloaded()
    with pytest.raises(TimeoutError, match="within 1 s"):
        process.run("http.server", ["0"], environment(), timeout=1.0)
    assert not psutil.Process(process.pid).children()
    assert process.run("json.tool", ["nowhere"], environment(), timeout=60.0).returncode == 2
