"""How a server's ranks hold the model: under which names, which tensors joined, and which share of each.

Source, all of SGLang 0.5.23: sglang.srt.models.llama, qwen2 and qwen3 (names, and what is joined), and
sglang.srt.layers.linear and vocab_parallel_embedding (shares).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from sdpg_megatron.architecture import Architecture
from sdpg_megatron.errors import RolloutError

VOCABULARY_UNIT = 64
"""SGLang fills the vocabulary with rows of zeros up to a multiple of this, or of this for each rank."""
CPU_FFN_UNIT = 32
"""On CPUs SGLang pads feed-forward columns to a multiple of this for each rank."""


@dataclass(frozen=True, slots=True)
class ServerLayout:
    """How a server's ranks share the weights, and where they lie."""

    tensor: int
    """Tensor-parallel ranks."""
    data: int
    """Replicas of them."""
    device: str
    """As SGLang names it: "cuda" and "cpu" hash differently."""

    @classmethod
    def read(cls, url: str, info: Mapping[str, Any]) -> ServerLayout:
        """From the server's /server_info.

        Raises:
            RolloutError: the server changes weights or shares them in a way that is not rebuilt here.
        """
        for key, plain in _PLAIN.items():
            if info.get(key, plain) != plain:
                raise RolloutError(
                    f"{url}: weights cannot be compared by checksum where the server's {key} is {info[key]!r}. "
                    f"Fix: start it with {plain!r}, or set rollout.sglang.verify_every to 0"
                )
        return cls(int(info["tp_size"]), int(info["dp_size"]), str(info["device"]))


_PLAIN: Mapping[str, Any] = {
    "pp_size": 1,
    "attn_cp_size": 1,
    "enable_dp_attention": False,
    "quantization": None,
    "rl_on_policy_target": None,
}
"""Server arguments with the only value that is supported: others cut, convert or leave out weights."""


Cut = Callable[[Tensor, Architecture, int, int], Tensor]
"""(whole tensor, architecture, tensor-parallel rank, size) -> that rank's share."""


def _whole(tensor: Tensor, arch: Architecture, rank: int, size: int) -> Tensor:
    return tensor


def _rows(tensor: Tensor, arch: Architecture, rank: int, size: int) -> Tensor:
    return tensor.chunk(size)[rank]


def _columns(tensor: Tensor, arch: Architecture, rank: int, size: int) -> Tensor:
    return tensor.chunk(size, dim=1)[rank]


def _key_value_heads(tensor: Tensor, arch: Architecture, rank: int, size: int) -> Tensor:
    """Where there are more ranks than heads, neighbours hold the same head."""
    replicas = max(1, size // arch.num_kv_heads)
    return _rows(tensor, arch, rank // replicas, size // replicas)


def _vocabulary(tensor: Tensor, arch: Architecture, rank: int, size: int) -> Tensor:
    """An equal share of the vocabulary and its padding, which lies at the end of the last ranks."""
    unit = VOCABULARY_UNIT
    if _up(arch.vocab_size, unit) % size:
        unit *= size
    rows = _up(arch.vocab_size, unit) // size
    held = tensor[rank * rows : (rank + 1) * rows]
    return pad(held, (0, 0, 0, rows - len(held))) if len(held) < rows else held


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


_CUTS: Mapping[str, Cut] = {
    "embed_tokens": _vocabulary,
    "input_layernorm": _whole,
    "q_proj": _rows,
    "k_proj": _key_value_heads,
    "v_proj": _key_value_heads,
    "q_norm": _whole,
    "k_norm": _whole,
    "o_proj": _columns,
    "post_attention_layernorm": _whole,
    "gate_proj": _rows,
    "up_proj": _rows,
    "down_proj": _columns,
    "norm": _whole,
    "lm_head": _vocabulary,
}
"""By the module that a tensor belongs to, the last part but one of its name."""
_JOINED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""The server's modules that hold several of a Hugging Face model's, end to end."""
_JOINED_BY_PART = {part: (joined, parts) for joined, parts in _JOINED.items() for part in parts}


def server_parameter(name: str) -> tuple[str, tuple[str, ...]]:
    """The server's name of what holds a Hugging Face tensor, and all the tensors that it holds, in their order."""
    prefix, module, kind = ("." + name).rsplit(".", 2)
    joined, parts = _JOINED_BY_PART.get(module, (module, (module,)))
    names = [f"{prefix}.{each}.{kind}".lstrip(".") for each in (joined, *parts)]
    return names[0], tuple(names[1:])


def check_layout(arch: Architecture, layout: ServerLayout) -> None:
    """Check that SGLang cuts this model without padding anything but its vocabulary. Raises `RolloutError`."""
    if arch.experts is not None:
        raise RolloutError(
            f"weights cannot be compared by checksum: how a server lays out the experts of a {arch.family} is not "
            "rebuilt here. Fix: set rollout.sglang.verify_every to 0"
        )
    size, on_cpu = layout.tensor, layout.device == "cpu"
    kv_heads = arch.num_kv_heads
    replicable = not on_cpu and size % kv_heads == 0
    ffn_unit = size * CPU_FFN_UNIT if on_cpu else size
    if arch.num_heads % size or arch.ffn_size % ffn_unit or (kv_heads % size and not replicable):
        raise RolloutError(
            f"weights cannot be compared by checksum: {arch.num_heads} heads, {kv_heads} key-value heads and "
            f"{arch.ffn_size} feed-forward columns do not share out evenly to {size} tensor-parallel ranks on "
            f"{layout.device}. Fix: change rollout.sglang.tensor, or set rollout.sglang.verify_every to 0"
        )


def share(name: str, tensor: Tensor, arch: Architecture, rank: int, size: int) -> Tensor:
    """What tensor-parallel rank `rank` of `size` holds of a Hugging Face tensor; see `check_layout`."""
    return _CUTS[name.split(".")[-2]](tensor, arch, rank, size)
