"""Hugging Face -> shards -> Hugging Face over tensor-parallel and pipeline ranks, bit for bit."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sdpg_megatron.architecture import Architecture, Family, read_architecture
from sdpg_megatron.errors import WeightError
from sdpg_megatron.weights import WeightStream, load_shards
from tests.pool import RankPool

MODELS: tuple[tuple[Family, bool], ...] = (("llama", False), ("qwen2", True), ("qwen3", True), ("qwen3", False))
LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2), (1, 4))
"""(tensor, pipeline) ranks."""
LAYERS = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    from tests.tiny import write_tiny_model  # here, as the ranks import this module and need no transformers

    root = tmp_path_factory.mktemp("models")
    return [
        write_tiny_model(root / f"{family}-{tied}", family, tied=tied, seed=seed, layers=LAYERS)
        for seed, (family, tied) in enumerate(MODELS)
    ]


def megatron_shapes(arch: Architecture, *, tp: int, stage: int, pp: int, fused: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a rank's GPTModel, written down here apart from the map."""
    hidden, query = arch.hidden_size, arch.num_heads * arch.head_dim
    qkv = (query + 2 * arch.num_kv_heads * arch.head_dim) // tp
    vocab = (-(-arch.vocab_size // (128 * tp)) * 128, hidden)
    shapes: dict[str, tuple[int, ...]] = {}
    if stage == 0:
        shapes["embedding.word_embeddings.weight"] = vocab
    for layer in range(stage * arch.num_layers // pp, (stage + 1) * arch.num_layers // pp):
        prefix = f"decoder.layers.{layer}."
        norms = ("self_attention.linear_qkv.layer_norm", "mlp.linear_fc1.layer_norm")
        first, second = (
            (f"{n}_weight" for n in norms) if fused else ("input_layernorm.weight", "pre_mlp_layernorm.weight")
        )
        shapes[prefix + first] = (hidden,)
        shapes[prefix + "self_attention.linear_qkv.weight"] = (qkv, hidden)
        if arch.family == "qwen2":
            shapes[prefix + "self_attention.linear_qkv.bias"] = (qkv,)
        if arch.family == "qwen3":
            shapes[prefix + "self_attention.q_layernorm.weight"] = (arch.head_dim,)
            shapes[prefix + "self_attention.k_layernorm.weight"] = (arch.head_dim,)
        shapes[prefix + "self_attention.linear_proj.weight"] = (hidden, query // tp)
        shapes[prefix + second] = (hidden,)
        shapes[prefix + "mlp.linear_fc1.weight"] = (2 * arch.ffn_size // tp, hidden)
        shapes[prefix + "mlp.linear_fc2.weight"] = (hidden, arch.ffn_size // tp)
    if stage == pp - 1:
        shapes["decoder.final_layernorm.weight"] = (hidden,)
        if not arch.tied_embeddings or pp > 1:
            shapes["output_layer.weight"] = vocab
    return shapes


class Rank:
    """One rank of a tensor x pipeline grid, with loaded parameters."""

    def __init__(self, folder: Path, tp: int, pp: int, *, fused: bool = False) -> None:
        rank = dist.get_rank()
        self.tp_rank, self.stage = rank % tp, rank // tp
        tp_groups = [dist.new_group([stage * tp + r for r in range(tp)]) for stage in range(pp)]
        pp_groups = [dist.new_group([stage * tp + r for stage in range(pp)]) for r in range(tp)]
        self.groups = {"tp_group": tp_groups[self.stage], "pp_group": pp_groups[self.tp_rank]}
        self.arch = read_architecture(folder)
        shapes = megatron_shapes(self.arch, tp=tp, stage=self.stage, pp=pp, fused=fused)
        # in an order that is not the canonical one, and not the same on every rank
        names = sorted(shapes, reverse=bool(rank % 2))
        self.params = {name: torch.full(shapes[name], torch.nan) for name in names}
        load_shards(self.params, folder, self.arch, tp_rank=self.tp_rank, tp_size=tp)


def round_trip(folder: Path, tp: int, pp: int, fused: bool) -> list[list[tuple[str, Tensor]]]:
    rank = Rank(folder, tp, pp, fused=fused)
    before = {name: parameter.clone() for name, parameter in rank.params.items()}
    buckets = [list(bucket) for bucket in WeightStream(rank.params, rank.arch, bucket_bytes=100_000, **rank.groups)]
    assert all(torch.equal(parameter, before[name]) for name, parameter in rank.params.items())
    return buckets


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("model", range(len(MODELS)), ids=lambda model: f"{MODELS[model][0]}-tied-{MODELS[model][1]}")
def test_round_trip_is_bitwise(ranks: RankPool, folders: list[Path], model: int, tp: int, pp: int) -> None:
    saved = load_file(folders[model] / "model.safetensors")
    leader, *others = ranks.run(round_trip, tp * pp, folders[model], tp, pp, fused=pp == 2)
    sent = [item for bucket in leader for item in bucket]
    assert len(sent) == len(saved) == len(dict(sent))
    assert all(torch.equal(tensor, saved[name]) for name, tensor in sent)
    for bucket in leader:
        # no parameter alone reaches 100 kB here
        assert 0 < sum(tensor.nbytes for _, tensor in bucket) <= 100_000
    assert others == [[[]] * len(leader)] * (tp * pp - 1)


def test_round_trip_over_many_tensor_ranks(ranks: RankPool, tmp_path: Path) -> None:
    from tests.tiny import write_tiny_model

    folder = write_tiny_model(tmp_path / "model", "qwen3", tied=False, seed=7, layers=LAYERS, kv_heads=4)
    saved = load_file(folder / "model.safetensors")
    sent = [item for bucket in ranks.run(round_trip, 4, folder, 4, 1, fused=False)[0] for item in bucket]
    assert len(sent) == len(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in sent)


def in_given_memory(folder: Path, tp: int, pp: int) -> list[tuple[str, Tensor]]:
    rank = Rank(folder, tp, pp)
    stream = WeightStream(rank.params, rank.arch, bucket_bytes=50_000, **rank.groups)
    memories = itertools.cycle([torch.full((200_000,), 255, dtype=torch.uint8) for _ in range(2)])
    used: list[int] = []

    def allocate(nbytes: int, device: torch.device) -> Tensor:
        memory = next(memories)
        used.append(memory.data_ptr())
        return memory

    stream.allocate = allocate
    found = []
    for number, bucket in enumerate(stream):
        found += [(name, tensor.clone()) for name, tensor in bucket]
        assert all(tensor.untyped_storage().data_ptr() == used[number] for _, tensor in bucket)
    return found


@pytest.mark.parametrize(("tp", "pp"), ((1, 1), (2, 2)))
def test_buckets_are_made_where_their_consumer_says(ranks: RankPool, folders: list[Path], tp: int, pp: int) -> None:
    saved = load_file(folders[3] / "model.safetensors")
    leader, *others = ranks.run(in_given_memory, tp * pp, folders[3], tp, pp)
    assert len(leader) == len(saved) and not any(others)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in leader)


def names_and_bytes(folder: Path, tp: int, pp: int, bucket_bytes: int) -> list[list[tuple[str, int]]]:
    rank = Rank(folder, tp, pp)
    buckets = WeightStream(rank.params, rank.arch, bucket_bytes=bucket_bytes, dtype=torch.bfloat16, **rank.groups)
    return [[(name, tensor.nbytes) for name, tensor in bucket] for bucket in buckets]


def test_order_does_not_depend_on_the_layout(ranks: RankPool, folders: list[Path]) -> None:
    single = ranks.run(names_and_bytes, 1, folders[3], 1, 1, 50_000)[0]
    assert [name for bucket in single for name, _ in bucket][:3] == [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ]
    assert ranks.run(names_and_bytes, 4, folders[3], 2, 2, 50_000)[0] == single


def test_a_parameter_beyond_the_bound_travels_alone(ranks: RankPool, folders: list[Path]) -> None:
    # bfloat16: embedding 38.4 kB, query, key and value together 32.8 kB, gate and up together 32.8 kB
    buckets = ranks.run(names_and_bytes, 2, folders[3], 2, 1, 35_000)[0]
    assert [len(bucket) for bucket in buckets if sum(size for _, size in bucket) > 35_000] == [1, 1]
    assert buckets[0] == [("model.embed_tokens.weight", 300 * 64 * 2)]
    assert buckets[-1] == [("lm_head.weight", 300 * 64 * 2)]


def cast(folder: Path, tp: int, pp: int) -> dict[str, Tensor]:
    rank = Rank(folder, tp, pp)
    return {n: t for b in WeightStream(rank.params, rank.arch, dtype=torch.bfloat16, **rank.groups) for n, t in b}


def test_casts_on_the_way(ranks: RankPool, folders: list[Path]) -> None:
    saved = load_file(folders[0] / "model.safetensors")
    sent = ranks.run(cast, 4, folders[0], 2, 2)[0]
    assert all(torch.equal(tensor, saved[name].bfloat16()) for name, tensor in sent.items())


def own_types(folder: Path, tp: int, pp: int) -> dict[str, torch.dtype]:
    rank = Rank(folder, tp, pp)
    params = {n: p if "norm" in n else p.bfloat16() for n, p in rank.params.items()}
    return {n: t.dtype for b in WeightStream(params, rank.arch, **rank.groups) for n, t in b}


def test_keeps_each_parameters_own_type(ranks: RankPool, folders: list[Path]) -> None:
    for name, dtype in ranks.run(own_types, 2, folders[3], 1, 2)[0].items():
        assert dtype is (torch.float32 if "norm" in name else torch.bfloat16), name


def single(folder: Path) -> tuple[dict[str, Tensor], Architecture]:
    arch = read_architecture(folder)
    shapes = megatron_shapes(arch, tp=1, stage=0, pp=1, fused=False)
    params = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    load_shards(params, folder, arch, tp_rank=0, tp_size=1)
    return params, arch


def test_tensors_do_not_follow_the_optimizer(folders: list[Path]) -> None:
    params, arch = single(folders[3])
    buckets = list(WeightStream(params, arch, bucket_bytes=50_000))
    for parameter in params.values():
        parameter.add_(1.0)
    sent = [item for bucket in buckets for item in bucket]
    saved = load_file(folders[3] / "model.safetensors")
    assert len(sent) == len(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in sent)


def test_keeps_no_bucket_that_it_gave_out(folders: list[Path]) -> None:
    params, arch = single(folders[0])
    buckets = WeightStream(params, arch, bucket_bytes=50_000)
    for _ in range(5):
        bucket = next(buckets)
        memory = StorageWeakRef(bucket.memory.untyped_storage())
        assert not memory.expired()
        del bucket
        assert memory.expired()


def spans(folder: Path, tp: int, pp: int) -> list[list[tuple[int, int, int, int]]]:
    """Of each bucket's tensors, by address: start and end from the bucket's first byte, element size, memory's size."""
    rank = Rank(folder, tp, pp)
    params = {n: p if "norm" in n else p.bfloat16() for n, p in rank.params.items()}
    found = []
    for bucket in WeightStream(params, rank.arch, bucket_bytes=50_000, **rank.groups):
        starts = sorted((t.data_ptr(), t.nbytes, t.itemsize, t.untyped_storage().nbytes()) for _, t in bucket)
        found.append([(start - starts[0][0], start - starts[0][0] + n, size, room) for start, n, size, room in starts])
    return found


@pytest.mark.parametrize(("tp", "pp"), ((1, 1), (2, 2)))
def test_a_bucket_is_one_run_of_bytes(ranks: RankPool, folders: list[Path], tp: int, pp: int) -> None:
    """Without gaps, each tensor at a multiple of its element size, though the types are mixed."""
    buckets = ranks.run(spans, tp * pp, folders[3], tp, pp)[0]
    assert any(len({size for _, _, size, _ in bucket}) == 2 for bucket in buckets)
    for bucket in buckets:
        end = 0
        for start, stop, size, room in bucket:
            assert start == end and start % size == 0
            end = stop
            assert room == bucket[-1][1]


def faulty(folder: Path, fault: str) -> str:
    """The stage 1 of two has the fault; both must say so, and neither may wait for the other."""
    rank = Rank(folder, 1, 2)
    if rank.stage == 1:
        match fault:
            case "missing":
                del rank.params["output_layer.weight"]
            case "layer":
                rank.params = {n: p for n, p in rank.params.items() if "layers.3." not in n}
            case "unknown":
                rank.params["decoder.layers.3.mlp.router.weight"] = torch.zeros(1)
            case "shape":
                rank.params["output_layer.weight"] = torch.zeros(300, 64)
            case "twice":
                rank.params["embedding.word_embeddings.weight"] = torch.zeros(384, 64)
            case "spelled twice":
                rank.params["decoder.layers.3.mlp.linear_fc1.layer_norm_weight"] = torch.zeros(64)
    try:
        next(WeightStream(rank.params, rank.arch, **rank.groups))
    except WeightError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "'lm_head.weight' has no place"),
        ("layer", "'model.layers.3.input_layernorm.weight' has no place"),
        ("unknown", "'decoder.layers.3.mlp.router.weight' is not in the map"),
        ("shape", "has shape [300, 64], expected [384, 64]"),
        ("twice", "'embedding.word_embeddings.weight' of pipeline stage 0 and 'embedding.word_embeddings.weight' of"),
        ("spelled twice", "'model.layers.3.post_attention_layernorm.weight' is held twice: by 'decoder.layers.3."),
    ],
)
def test_a_fault_on_one_stage_is_raised_on_all(ranks: RankPool, folders: list[Path], fault: str, message: str) -> None:
    first, second = ranks.run(faulty, 2, folders[3], fault)
    assert message in first
    assert first == second
