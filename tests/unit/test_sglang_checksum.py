"""How checksums are foreseen and compared: against a plain twin of SGLang's loading rules, without a server."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdpg_megatron.architecture import Architecture, Experts, Family
from sdpg_megatron.errors import RolloutError, WeightError
from sdpg_megatron.rollout.sglang.checksum import (
    CUDA_HASHES,
    LISTED,
    Comparison,
    ExpectedChecksums,
    Served,
    compare,
    hash_on,
    sha256_hash,
    verify,
)
from sdpg_megatron.rollout.sglang.client import RankChecksums
from sdpg_megatron.rollout.sglang.server_layout import ServerLayout
from sdpg_megatron.weights import Bucket, hf_shapes

URL = "http://server:1"
VARIANTS: tuple[tuple[Family, bool], ...] = (("llama", False), ("qwen2", True), ("qwen3", True), ("qwen3", False))
SIZES = (1, 2, 3, 6, 12)
"""Of tensor parallelism. Key-value heads are 6: 12 ranks share them in pairs."""


def architecture(family: Family = "qwen3", tied: bool = False) -> Architecture:
    """300 tokens are no multiple of 64, and 320 none of 3: where that divides the ranks, some hold padding alone."""
    return Architecture(
        family=family,
        num_layers=2,
        hidden_size=24,
        ffn_size=384,
        num_heads=24,
        num_kv_heads=6,
        head_dim=6,
        vocab_size=300,
        max_positions=64,
        rms_eps=1e-6,
        rope_theta=1e4,
        rope_scaling=None,
        tied_embeddings=tied,
    )


def weights(arch: Architecture, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in hf_shapes(arch).items()}


def one_by_one(hf: Mapping[str, Tensor]) -> Iterator[Bucket]:
    for item in hf.items():
        yield [item]


def loaded(arch: Architecture, hf: Mapping[str, Tensor], rank: int, size: int) -> dict[str, Tensor]:
    """What SGLang's weight loaders leave in a rank's parameters, written down row by row."""
    heads, dim = arch.num_heads // size, arch.head_dim
    kv_heads = max(1, arch.num_kv_heads // size)
    kv_rank = rank // (size // arch.num_kv_heads) if size > arch.num_kv_heads else rank
    ffn = arch.ffn_size // size
    vocab = -(-arch.vocab_size // 64) * 64
    if vocab % size:
        vocab = -(-arch.vocab_size // (64 * size)) * 64 * size
    rows = vocab // size
    params: dict[str, Tensor] = {}
    for name, tensor in hf.items():
        stem, module, kind = name.rsplit(".", 2) if name.count(".") > 1 else ("", *name.split("."))
        if module in ("embed_tokens", "lm_head"):
            params[name] = torch.zeros(rows, arch.hidden_size)
            for row in range(rank * rows, min((rank + 1) * rows, arch.vocab_size)):
                params[name][row - rank * rows] = tensor[row]
        elif module == "q_proj":
            q, k, v = (hf[f"{stem}.{x}_proj.{kind}"] for x in "qkv")
            joined = torch.full(((heads + 2 * kv_heads) * dim, *tensor.shape[1:]), torch.nan)
            joined[: heads * dim] = q[rank * heads * dim :][: heads * dim]
            joined[heads * dim : (heads + kv_heads) * dim] = k[kv_rank * kv_heads * dim :][: kv_heads * dim]
            joined[(heads + kv_heads) * dim :] = v[kv_rank * kv_heads * dim :][: kv_heads * dim]
            params[f"{stem}.qkv_proj.{kind}"] = joined
        elif module == "gate_proj":
            gate, up = (hf[f"{stem}.{x}_proj.{kind}"][rank * ffn :][:ffn] for x in ("gate", "up"))
            params[f"{stem}.gate_up_proj.{kind}"] = torch.stack((gate, up)).flatten(0, 1)
        elif module in ("o_proj", "down_proj"):
            columns = tensor.shape[1] // size
            params[name] = tensor[:, rank * columns :][:, :columns]
        elif module not in ("k_proj", "v_proj", "up_proj"):
            params[name] = tensor
    return params


def layout(size: int = 1, data: int = 1, device: str = "npu") -> ServerLayout:
    """On a device where SGLang pads nothing but the vocabulary, and hashes as on CPUs."""
    return ServerLayout(size, data, device)


def expected(arch: Architecture, hf: Mapping[str, Tensor], size: int = 1) -> list[dict[str, str]]:
    checksums = ExpectedChecksums(arch, layout(size))
    checksums.add(list(hf.items()))
    return checksums.finish()


def served(ranks: Sequence[Mapping[str, str]], data: int = 1, url: str = URL) -> Served:
    """A server that answers `ranks`."""
    size = len(ranks) // data
    return Served(url, layout(size, data), [RankChecksums(i % size, size, rank) for i, rank in enumerate(ranks)])


# --- foreseeing


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("family", "tied"), VARIANTS)
def test_every_rank_is_foreseen_as_sglang_loads_it(family: Family, tied: bool, size: int) -> None:
    arch = architecture(family, tied)
    hf = weights(arch)
    twins = [loaded(arch, hf, rank, size) for rank in range(size)]
    assert expected(arch, hf, size) == [{name: sha256_hash(twin) for name, twin in ranks.items()} for ranks in twins]


@pytest.mark.parametrize("size", SIZES)
def test_shares_make_up_the_whole(size: int) -> None:
    arch = architecture("qwen2", tied=False)
    hf = weights(arch)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> str:
        kept.append(tensor)
        return str(len(kept) - 1)

    checksums = ExpectedChecksums(arch, layout(size), keep)
    checksums.add(list(hf.items()))
    ranks = [{name: kept[int(place)] for name, place in rank.items()} for rank in checksums.finish()]
    layer, heads = "model.layers.1.", arch.num_heads // size * arch.head_dim
    vocabulary = torch.cat([rank["lm_head.weight"] for rank in ranks])
    assert torch.equal(vocabulary[: arch.vocab_size], hf["lm_head.weight"])
    assert not vocabulary[arch.vocab_size :].any() and len(vocabulary) > arch.vocab_size
    for kind in ("weight", "bias"):
        queries = [rank[f"{layer}self_attn.qkv_proj.{kind}"][:heads] for rank in ranks]
        assert torch.equal(torch.cat(queries), hf[f"{layer}self_attn.q_proj.{kind}"])
    gates, ups = zip(*(rank[f"{layer}mlp.gate_up_proj.weight"].chunk(2) for rank in ranks), strict=True)
    assert torch.equal(torch.cat(gates), hf[f"{layer}mlp.gate_proj.weight"])
    assert torch.equal(torch.cat(ups), hf[f"{layer}mlp.up_proj.weight"])
    for name in (f"{layer}self_attn.o_proj.weight", f"{layer}mlp.down_proj.weight"):
        assert torch.equal(torch.cat([rank[name] for rank in ranks], dim=1), hf[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hash_is_of_the_bytes(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 5).to(dtype)
    data = bytes(tensor.clone().untyped_storage())
    assert sha256_hash(tensor) == hashlib.sha256(data).digest()[:8].hex()
    assert sha256_hash(tensor.T.contiguous().T) == sha256_hash(tensor), "the bytes are those in row order"


def test_no_more_is_held_than_the_parts_of_one_parameter() -> None:
    arch = architecture("llama")
    made: list[weakref.ref[Tensor]] = []
    held: list[int] = []

    def bucket(name: str, shape: tuple[int, ...]) -> Bucket:
        held.append(sum(ref() is not None for ref in made))
        tensor = torch.zeros(shape)
        made.append(weakref.ref(tensor))
        return [(name, tensor)]

    zeros = {name: torch.zeros(shape) for name, shape in hf_shapes(arch).items()}
    verify(arch, [served(expected(arch, zeros, 2))], (bucket(*item) for item in hf_shapes(arch).items()))
    assert held[:6] == [0, 0, 0, 1, 2, 0], "query, then query and key, wait for value"
    assert max(held) == 2


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"model.norm.scale": torch.zeros(24)}, "'model.norm.scale' of shape (24,), expected none"),
        ({"model.norm.weight": torch.zeros(23)}, "'model.norm.weight' of shape (23,), expected (24,)"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(fault: dict[str, Tensor], message: str) -> None:
    with pytest.raises(WeightError, match=re.escape(message)):
        ExpectedChecksums(architecture(), layout()).add(list(fault.items()))


def test_a_tensor_must_come_once() -> None:
    arch = architecture()
    hf = weights(arch)
    checksums = ExpectedChecksums(arch, layout())
    checksums.add([item for item in hf.items() if item[0] != "model.norm.weight"])
    with pytest.raises(WeightError, match=r"ended without 'model\.norm\.weight'"):
        checksums.finish()
    with pytest.raises(WeightError, match=r"lm_head\.weight.*expected none"):
        checksums.add([("lm_head.weight", hf["lm_head.weight"])])


# --- comparing


def test_one_element_is_found_and_nothing_else_named() -> None:
    arch = architecture()
    hf = weights(arch)
    server = served(expected(arch, hf, 2))
    name = "model.layers.1.mlp.up_proj.weight"
    hf[name] = hf[name].clone()
    hf[name][-1, -1] += 1e-3  # the last row: rank 1 alone
    with pytest.raises(WeightError) as raised:
        verify(arch, [server], one_by_one(hf))
    assert str(raised.value).startswith(
        f"{URL}: 1 of {len(server.ranks[0].by_name)} weights are not the trainer's, on tensor-parallel ranks [1]: "
        "'model.layers.1.mlp.gate_up_proj.weight'. Fix: "
    )


def test_equal_weights_pass_on_servers_of_several_layouts() -> None:
    arch = architecture()
    hf = weights(arch)
    servers = [served(expected(arch, hf)), served(expected(arch, hf, 2) * 2, data=2, url="http://other:2")]
    found = verify(arch, servers, one_by_one(hf))
    assert [str(comparison) for comparison in found] == [
        f"{URL}: 19 weights equal",
        "http://other:2: 19 weights equal",
    ]


def test_every_faulty_server_and_the_first_tensors_are_named() -> None:
    arch = architecture()
    hf = weights(arch)
    good = served(expected(arch, hf), url="http://good:1")
    stale = [served(expected(arch, weights(arch, seed=1)), url=f"http://stale:{port}") for port in (1, 2)]
    with pytest.raises(WeightError) as raised:
        verify(arch, [stale[0], good, stale[1]], one_by_one(hf))
    first, second = str(raised.value).split("\n")
    assert first.startswith("http://stale:1: ") and second.startswith("http://stale:2: ")
    assert first.count("'model.") == LISTED and f"and {19 - LISTED} more" in first
    assert "'model.embed_tokens.weight', 'model.layers.0.input_layernorm.weight'" in first, "in the model's order"


def test_a_replica_that_differs_is_found() -> None:
    arch = architecture()
    ranks = expected(arch, weights(arch)) * 2
    ranks[1] = ranks[1] | {"model.norm.weight": "0" * 16}
    assert compare(ranks[:1], served(ranks, data=2)).different == {"model.norm.weight": [0]}


def test_what_only_one_side_has_is_told() -> None:
    arch = architecture()
    (ours,) = expected(arch, weights(arch))
    theirs = dict(ours)
    checksum = theirs.pop("model.norm.weight")
    theirs["draft.model.norm.weight"] = theirs["model.norm.scale"] = checksum
    found = compare([ours], served([theirs]))
    assert found == Comparison(
        url=URL,
        equal=18,
        different={},
        absent=("model.norm.weight",),
        not_compared=("draft.model.norm.weight", "model.norm.scale"),
    )
    assert found.fault == "it has no 'model.norm.weight'. Fix: start it with the run's model.path"
    assert "2 not compared: 'draft.model.norm.weight', 'model.norm.scale'" in str(found)
    assert replace(found, absent=()).fault is None


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_a_rank_that_does_not_answer_is_an_error(keep: int) -> None:
    arch = architecture()
    ranks = expected(arch, weights(arch), 2)
    answer = served(ranks * 2, data=2)
    with pytest.raises(RolloutError, match="expected 2 of each of 2"):
        compare(ranks, replace(answer, ranks=answer.ranks[:keep]))


@pytest.mark.parametrize("fault", ["layout", "tensor", "answer"])
def test_the_stream_is_read_to_its_end_whatever_fails(fault: str) -> None:
    arch = architecture()
    hf = weights(arch)
    server = served(expected(arch, hf))
    if fault == "layout":
        server = replace(server, layout=layout(5))
    if fault == "answer":
        server = replace(server, ranks=[])
    ended = False

    def stream() -> Iterator[Bucket]:
        nonlocal ended
        for name, tensor in hf.items():
            yield [(name, tensor[:1] if fault == "tensor" else tensor)]
        ended = True

    with pytest.raises((RolloutError, WeightError)):
        verify(arch, [server], stream())
    assert ended


# --- what cannot be compared


@pytest.mark.parametrize(
    ("key", "value"),
    [("pp_size", 2), ("enable_dp_attention", True), ("quantization", "fp8"), ("rl_on_policy_target", "fsdp")],
)
def test_servers_that_change_weights_are_refused(key: str, value: object) -> None:
    info = {"tp_size": 2, "dp_size": 3, "device": "cuda", "pp_size": 1, "quantization": None}
    assert ServerLayout.read(URL, info) == ServerLayout(2, 3, "cuda")
    with pytest.raises(RolloutError, match=rf"{URL}.*{key} is {value!r}.*verify_every"):
        ServerLayout.read(URL, info | {key: value})


@pytest.mark.parametrize(
    ("size", "device", "works"),
    [(2, "cpu", True), (12, "cpu", False), (12, "npu", True), (4, "npu", False), (48, "npu", False)],
)
def test_uneven_cuts_are_refused(size: int, device: str, works: bool) -> None:
    """On a CPU, 12 ranks would have half a key-value head each, where SGLang adds heads."""
    if works:
        ExpectedChecksums(architecture(), layout(size, device=device))
    else:
        with pytest.raises(RolloutError, match=f"do not share out evenly to {size} tensor-parallel ranks on {device}"):
            ExpectedChecksums(architecture(), layout(size, device=device))


def test_feed_forward_padding_on_cpus_is_refused() -> None:
    with pytest.raises(RolloutError, match="250 feed-forward columns"):
        ExpectedChecksums(replace(architecture(), ffn_size=250), layout(device="cpu"))


@pytest.mark.skipif(importlib.util.find_spec("sglang") is not None, reason="sglang is installed here")
@pytest.mark.parametrize("place", CUDA_HASHES)
def test_cuda_servers_need_sglangs_hash(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RolloutError, match="pip install --no-deps sglang"):
        hash_on("cuda")
    (tmp_path / "sglang" / place).parent.mkdir(parents=True)
    (tmp_path / "sglang" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "sglang" / place).write_text("def gpu_tensor_hash(tensor):\n    return len(tensor)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(Tensor, "cuda", lambda tensor: tensor)
    assert hash_on("cuda")(torch.zeros(10)) == "000000000000000a"


def test_mixtures_of_experts_are_refused() -> None:
    mixture = replace(architecture("mixtral"), experts=Experts(count=4, per_token=2, normalized=True))
    with pytest.raises(RolloutError, match=r"experts of a mixtral .*Fix: set rollout\.sglang\.verify_every to 0"):
        ExpectedChecksums(mixture, layout())
