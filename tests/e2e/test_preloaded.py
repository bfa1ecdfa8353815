"""Forks of the preloaded process stand for the real command in the tests beside this one."""

from __future__ import annotations

import socket

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
        process.run("http.server", ["0"], [environment()] * 2, timeout=1.0)
    assert not psutil.Process(process.pid).children()
    assert process.run("json.tool", ["nowhere"], [environment()], timeout=60.0).returncode == 2


def test_where_a_rank_fails_the_others_are_ended() -> None:
    """Of two that serve at one port, the second fails, and the first would go on for ever."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    done = preloaded().run("http.server", [str(port)], [environment()] * 2, timeout=60.0)
    assert done.returncode == 1
    assert "Address already in use" in done.stderr
