"""Megatron-LM's `pretrain()` with rollouts from a real server that gets its weights between steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.host.test_megatron_lm import LAYOUTS, logged, pretrain, write_host_run
from tests.sglang.conftest import Running

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None,
    reason="needs megatron.training, which megatron-core packages for Python 3.12",
)


def test_two_iterations_on_a_server(server: Running, model: Path, tmp_path: Path) -> None:
    """The second iteration's log-probs agree only if the server has Megatron-LM's updated weights."""
    ranks, flags = LAYOUTS["tp2"]
    served = {"engine": "sglang", "sglang": {"urls": [server.url], "verify_every": 1}}
    rollout = {"prompts_per_step": 4, "group_size": 4, "max_response_tokens": 6, **served}
    folder = write_host_run(tmp_path, rollout=rollout)
    done = pretrain(folder, *flags, "--sdpg-set", f"model.path={model}", ranks=ranks, model=model)
    assert done.returncode == 0, done.stderr[-3000:]
    found = logged(done.stdout)
    assert len(found) == 2
    assert all(metrics["rollout/logprob_diff_max"] < 1e-3 for metrics in found)
    assert found[0]["grad norm"] > 0
