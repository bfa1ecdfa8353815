"""NCCL variables of the trainer are those that SGLang sets, whatever has started it."""

from __future__ import annotations

from sdpg_megatron.mcore.parallel import set_nccl_defaults


def test_the_users_values_win() -> None:
    variables = {"NCCL_NVLS_ENABLE": "1"}
    set_nccl_defaults(variables)
    assert variables == {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "1"}
