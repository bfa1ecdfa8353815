"""Conversion in one process: what arrives, what travels along, and what is refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpg_megatron import cli
from sdpg_megatron.architecture import read_architecture
from sdpg_megatron.checkpoint.pickles import read_tensor_list
from sdpg_megatron.convert import convert as conversion
from sdpg_megatron.convert import tensors, verify
from sdpg_megatron.convert.arguments import arguments_of
from sdpg_megatron.convert.command import convert
from sdpg_megatron.convert.roundtrip_check import check_same_tensors
from sdpg_megatron.convert.torch_dist import TorchDist
from sdpg_megatron.convert.torch_dist_writer import Block, write_torch_dist
from sdpg_megatron.convert.verify import logit_difference
from sdpg_megatron.errors import CheckpointError, ConfigError, ConversionError, WeightError
from tests.tiny import write_tiny_model

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("source") / "model", "qwen3", tied=False, seed=5)


@pytest.fixture(scope="module")
def megatron(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("converted") / "megatron"
    convert(model, target, console=QUIET)
    return target


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows at a time, so that blocks end within tensors and within groups of query heads."""
    monkeypatch.setattr(tensors, "BLOCK_BYTES", 64 * 4 * 3)


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("family", "tied"), [("llama", True), ("qwen2", False), ("qwen3_moe", True), ("mixtral", False)]
)
@pytest.mark.usefixtures("small_blocks")
def test_there_and_back_bit_for_bit(tmp_path: Path, family: str, tied: bool) -> None:
    source = write_tiny_model(tmp_path / "model", family, tied=tied, seed=4, layers=2)
    convert(source, tmp_path / "megatron", console=QUIET)
    convert(tmp_path / "megatron", tmp_path / "back", console=QUIET)
    assert same(weights(tmp_path / "back"), weights(source))
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((source / "config.json").read_text())


def test_the_size_that_is_shown_is_the_models(tmp_path: Path) -> None:
    """Though every byte is moved twice: written, and read back."""
    source = write_tiny_model(tmp_path / "model", "llama", tied=False, seed=4, layers=2, hidden=256)
    size = sum(tensor.nbytes for tensor in weights(source).values())
    said = io.StringIO()
    convert(source, tmp_path / "megatron", console=Console(file=said))
    convert(tmp_path / "megatron", tmp_path / "back", console=Console(file=said))
    assert re.findall(r"([\d,]+) MB in ", said.getvalue()) == [f"{size / 1e6:,.0f}"] * 2


@pytest.mark.usefixtures("small_blocks")
def test_no_block_is_larger_than_its_bound(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    read = tensors.FolderTensors.rows

    def watched(self: tensors.FolderTensors, name: str, start: int, length: int) -> Tensor:
        nonlocal largest
        found = read(self, name, start, length)
        largest = max(largest, found.nbytes)
        return found

    monkeypatch.setattr(tensors.FolderTensors, "rows", watched)
    convert(model, tmp_path / "megatron", console=QUIET)
    assert 0 < largest <= tensors.BLOCK_BYTES


@pytest.mark.parametrize("to", ["megatron", "huggingface"])
def test_the_disk_keeps_everything_before_it_is_put_in_place(
    model: Path, megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    kept, target = set(), tmp_path / "target"

    def fsync(descriptor: int) -> None:
        assert not target.exists()
        kept.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path / ".target.partial"))

    monkeypatch.setattr(os, "fsync", fsync)
    convert(model if to == "megatron" else megatron, target, console=QUIET)
    assert kept == {Path(), *(path.relative_to(target) for path in target.rglob("*"))}


def test_a_disk_that_keeps_nothing_is_an_error(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ConversionError, match="No space left on device"):
        convert(model, tmp_path / "megatron", console=QUIET)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_done_that_nobody_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checksums that torch does not read, and copies of rows that are a part of a larger tensor."""
    whole, copied = torch.arange(12.0).bfloat16().view(6, 2), []

    def make() -> Tensor:
        assert not torch.serialization.get_crc32_options()
        return whole[1:5]

    clone = Tensor.clone
    monkeypatch.setattr(Tensor, "clone", lambda *given, **options: copied.append(1) or clone(*given, **options))
    write_torch_dist(tmp_path, [Block("w", (4, 2), torch.bfloat16, (), 0, 4, make)], [], {})
    assert torch.serialization.get_crc32_options() and not copied
    assert torch.equal(TorchDist(tmp_path).rows("w", (), 1, 3), whole[2:5])


def test_no_compiler_is_loaded(model: Path, tmp_path: Path) -> None:
    """What torch imports for fake tensors takes longer than the conversion of a small model."""
    program = (
        "import sys, torch.distributed.checkpoint; before = 'torch._dynamo' in sys.modules  # torch 2.7 does\n"
        "from sdpg_megatron.cli import main; main(); sys.exit('torch._dynamo' in sys.modules and not before)"
    )
    line = [sys.executable, "-c", program, "convert", str(model), str(tmp_path / "megatron")]
    subprocess.run(line, check=True, timeout=120)
    assert (tmp_path / "megatron").exists()


def test_casts(model: Path, megatron: Path, tmp_path: Path) -> None:
    expected = {name: tensor.bfloat16() for name, tensor in weights(model).items()}
    convert(megatron, tmp_path / "model", dtype="bfloat16", console=QUIET)
    assert same(weights(tmp_path / "model"), expected)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").dtype is torch.bfloat16

    convert(model, tmp_path / "megatron", dtype="bfloat16", console=QUIET)
    convert(tmp_path / "megatron", tmp_path / "wide", dtype="float32", console=QUIET)
    assert same(weights(tmp_path / "wide"), {name: tensor.float() for name, tensor in expected.items()})


def test_several_files(model: Path, megatron: Path, tmp_path: Path) -> None:
    convert(megatron, tmp_path / "model", shard_bytes=200_000, console=QUIET)
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert all(sum(tensor.nbytes for tensor in load_file(file).values()) <= 200_000 for file in files)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights(model).values())
    assert all(name in load_file(tmp_path / "model" / file) for name, file in index["weight_map"].items())
    assert same(weights(tmp_path / "model"), weights(model))


def test_tokenizer_template_and_generation_defaults_travel(model: Path, megatron: Path, tmp_path: Path) -> None:
    convert(megatron, tmp_path / "model", console=QUIET)
    chat = [{"role": "user", "content": "12 + 34"}]
    one, other = (AutoTokenizer.from_pretrained(folder) for folder in (model, tmp_path / "model"))
    assert one.apply_chat_template(chat, tokenize=False) == other.apply_chat_template(chat, tokenize=False)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config.eos_token_id == [2, 4]


def test_what_megatron_lm_looks_for(model: Path, megatron: Path) -> None:
    assert (megatron / "latest_checkpointed_iteration.txt").read_text() == "release"
    backends = json.loads((megatron / "release/metadata.json").read_text())
    assert backends["sharded_backend"] == "torch_dist" and backends["common_backend"] == "torch"
    checkpoint = TorchDist(megatron / "release")
    common, arguments = checkpoint.common(), arguments_of(checkpoint)
    assert common["checkpoint_version"] == 3.0 and common["iteration"] == 0
    assert (arguments["num_layers"], arguments["num_query_groups"], arguments["kv_channels"]) == (4, 2, 32)
    assert arguments["qk_layernorm"] and not arguments["add_qkv_bias"] and arguments["swiglu"]
    assert arguments["untie_embeddings_and_output_weights"] and arguments["padded_vocab_size"] == 384
    qkv = checkpoint.tensors["decoder.layers.self_attention.linear_qkv.weight"]
    assert tuple(qkv.size) == (4, 256, 64)
    assert MetadataIndex("decoder.layers.mlp.linear_fc1._extra_state/shard_3_4") in checkpoint._metadata.storage_data


def test_existing_targets_are_refused(model: Path, megatron: Path, tmp_path: Path) -> None:
    for source, other in ((model, megatron), (megatron, model)):
        before = sorted(other.rglob("*"))
        with pytest.raises(ConversionError, match=r"found an existing path, expected a new path\. Fix"):
            convert(source, other, console=QUIET)
        assert sorted(other.rglob("*")) == before


@pytest.mark.parametrize("way", ["to_megatron", "to_hugging_face"])
def test_a_failure_leaves_nothing(
    model: Path, megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    kind = tensors.FolderTensors if way == "to_megatron" else tensors.CheckpointTensors
    read, calls = kind.rows, 0

    def failing(self: tensors.Tensors, name: str, start: int, length: int) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise OSError(28, "No space left on device")
        found: Tensor = read(self, name, start, length)  # type: ignore[arg-type]
        return found

    monkeypatch.setattr(kind, "rows", failing)
    with pytest.raises(ConversionError, match=r"found .*No space left on device.*Fix: free space on the disk"):
        convert(model if way == "to_megatron" else megatron, tmp_path / "target", console=QUIET)
    assert list(tmp_path.iterdir()) == []


def test_what_arrives_differently_is_found(model: Path, tmp_path: Path) -> None:
    arch = read_architecture(model)
    changed = tmp_path / "changed"
    shutil.copytree(model, changed)
    stored = load_file(changed / "model.safetensors")
    stored["model.layers.2.self_attn.v_proj.weight"][3, 5] += 1e-6
    save_file(stored, changed / "model.safetensors")
    one, other = (partial(tensors.FolderTensors, folder, arch) for folder in (model, changed))
    specs = conversion._specs(one(), None)
    check_same_tensors(one, one, specs, tmp_path, lambda count: None)
    with pytest.raises(ConversionError, match=r"model\.layers\.2\.self_attn\.v_proj\.weight: found other numbers"):
        check_same_tensors(one, other, specs, tmp_path, lambda count: None)


@pytest.mark.parametrize(
    ("way", "name", "file"),
    [
        ("to_megatron", "write_torch_dist", "__0_0.distcp"),
        ("to_hugging_face", "write_safetensors", "model.safetensors"),
    ],
)
def test_what_the_disk_changed_is_never_put_in_place(
    model: Path, megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, name: str, file: str
) -> None:
    write = getattr(conversion, name)

    def faulty(path: Path, *arguments: object) -> None:
        write(path, *arguments)
        written = path / file if path.is_dir() else path
        content = bytearray(written.read_bytes())
        at = content.index(model_bytes)
        content[at] ^= 1
        written.write_bytes(content)

    model_bytes = weights(model)["model.layers.1.mlp.down_proj.weight"].numpy().tobytes()
    monkeypatch.setattr(conversion, name, faulty)
    with pytest.raises(
        ConversionError, match=r"model\.layers\.1\.mlp\.down_proj\.weight: found other numbers in rows 0"
    ):
        convert(model if way == "to_megatron" else megatron, tmp_path / "target", console=QUIET)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, r"num_layers: found 4, expected 2"),
        ({"vocab_size": 500}, r"vocab_size: found 300, expected 500"),
        ({"tie_word_embeddings": True}, r"untie_embeddings_and_output_weights: found True"),
    ],
)
def test_another_models_config_json_is_refused(
    model: Path, megatron: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    like = tmp_path / "like"
    shutil.copytree(model, like)
    config = json.loads((like / "config.json").read_text())
    (like / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ConversionError, match=message):
        convert(megatron, tmp_path / "target", like=like, console=QUIET)
    (megatron / "release/common.pt").rename(tmp_path / "common.pt")  # without arguments, the shapes tell
    torch.save({}, megatron / "release/common.pt")
    try:
        with pytest.raises(ConversionError, match=r"release: tensor '.*': found .*config\.json"):
            convert(megatron, tmp_path / "target", like=like, console=QUIET)
    finally:
        (tmp_path / "common.pt").replace(megatron / "release/common.pt")
    assert not (tmp_path / "target").exists()


def test_a_checkpoint_that_knows_no_config_json_needs_one(megatron: Path, tmp_path: Path) -> None:
    shutil.copytree(megatron / "release", tmp_path / "iter_0000005")
    with pytest.raises(ConversionError, match=r"weights alone, expected .*--like FOLDER"):
        convert(tmp_path / "iter_0000005", tmp_path / "target", console=QUIET)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "metadata.json", "common.pt"])
def test_damage_of_a_checkpoint_is_named(megatron: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "megatron"
    shutil.copytree(megatron, path)
    for content in ((path / "release" / name).read_bytes()[:-9], b"", None):
        if content is None:
            (path / "release" / name).unlink()
        else:
            (path / "release" / name).write_bytes(content)
        if name == "metadata.json" and content is None:
            continue  # then it is no Megatron checkpoint
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            convert(path, tmp_path / "target", console=QUIET)
    assert not (tmp_path / "target").exists()


class Harm:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('a stranger ran this')",)


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_nothing_in_a_checkpoint_is_run(megatron: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "megatron"
    shutil.copytree(megatron, path)
    if name == ".metadata":
        (path / "release" / name).write_bytes(pickle.dumps(Harm()))
    else:
        torch.save({"args": Harm()}, path / "release" / name)
    with pytest.raises(CheckpointError, match=name):
        convert(path, tmp_path / "target", console=QUIET)


def test_nothing_in_the_tensors_files_is_run_by_verifying(model: Path, megatron: Path, tmp_path: Path) -> None:
    """The entries beside the weights (`_extra_state`) are bytes that megatron-core has torch read as any object."""
    path = tmp_path / "megatron"
    shutil.copytree(megatron, path)
    harm = io.BytesIO()
    torch.save(Harm(), harm)
    listed = read_tensor_list(path / "release")
    for index, place in listed.storage_data.items():
        if "_extra_state" in index.fqn:
            file = path / "release" / place.relative_path
            place.offset, place.length = file.stat().st_size, len(harm.getvalue())
    file.write_bytes(file.read_bytes() + harm.getvalue())
    (path / "release" / ".metadata").write_bytes(pickle.dumps(listed))
    with pytest.raises(CheckpointError, match="Weights only load failed"):
        logit_difference(model, path / "release", "1 2 3")


def test_tensors_of_two_types_in_one_parameter_need_a_choice(model: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(model, mixed)
    stored = load_file(mixed / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**stored, name: stored[name].bfloat16()}, mixed / "model.safetensors")
    with pytest.raises(ConversionError, match=r"up_proj\.weight: found the types .*--dtype"):
        convert(mixed, tmp_path / "target", console=QUIET)
    convert(mixed, tmp_path / "target", dtype="bfloat16", console=QUIET)


def test_a_quantized_folder_is_refused(model: Path, tmp_path: Path) -> None:
    quantized = tmp_path / "quantized"
    shutil.copytree(model, quantized)
    stored = load_file(quantized / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**stored, name: stored[name].to(torch.int8)}, quantized / "model.safetensors")
    with pytest.raises(WeightError, match=r"model\.safetensors: tensor '.*up_proj\.weight' has type I8"):
        convert(quantized, tmp_path / "target", console=QUIET)


def test_the_commands(model: Path, megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", str(model), str(tmp_path / "a"), "--dtype", "bfloat16", "--to", "megatron"]) == 0
    assert "MB in" in capsys.readouterr().err
    assert cli.main(["convert", str(model), str(tmp_path / "b"), "--to", "huggingface"]) == 2
    assert "a Hugging Face folder, expected a Megatron checkpoint" in capsys.readouterr().err
    assert cli.main(["convert", str(tmp_path / "none"), str(tmp_path / "b")]) == 2
    assert "found no such path" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("text", "message"), [("later", "found 'later', expected a number"), ("12", "found 12, expected .*iter_0000012")]
)
def test_a_tracker_that_names_nothing(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(ConversionError, match=rf"latest_checkpointed_iteration\.txt: {message}"):
        convert(tmp_path, tmp_path / "target", console=QUIET)


def test_a_text_that_cannot_be_read_is_known_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "write_torch_dist", lambda *_: pytest.fail("written"))
    for text in ("1 " * 5000, ""):
        with pytest.raises(ConversionError, match=r"--verify: found a text of \d+ tokens, expected 1 to \d+"):
            convert(model, tmp_path / "target", text=text, console=QUIET)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "tokenizer.json").write_text("{")
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(model / name, bare / name)
    with pytest.raises(ConfigError, match=r"bare/tokenizer\.json: .*expected a tokenizer that transformers"):
        convert(bare, tmp_path / "target", text="1", console=QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


@pytest.mark.parametrize("to", ["megatron", "huggingface"])
def test_logits_are_compared_before_the_result_is_in_place(
    model: Path, megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    target = tmp_path / "target"
    source = model if to == "megatron" else megatron

    def failing(folder: Path, checkpoint: Path, *_: object) -> tuple[float, float]:
        assert not target.exists()
        read_architecture(folder), TorchDist(checkpoint)
        raise CheckpointError("another model")

    monkeypatch.setattr(verify, "logit_difference", failing)
    with pytest.raises(CheckpointError, match="another model"):
        convert(source, target, text="1 2", console=QUIET)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("back", [False, True], ids=["to_megatron", "to_hugging_face"])
def test_rounded_weights_are_compared_with_rounded_ones(
    model: Path, megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], back: bool
) -> None:
    """A cast to bfloat16 is no fault: without it the logits of these models differ by over a hundredth."""
    source = str(megatron if back else model)
    assert cli.main(["convert", source, str(tmp_path / "target"), "--dtype", "bfloat16", "--verify", "1 2 3 4"]) == 0
    said = re.search(r"largest difference of logits: (\S+); largest logit: (\S+)", capsys.readouterr().err)
    assert said is not None and float(said[1]) < 1e-5 * float(said[2])


def test_logits_that_differ_are_an_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers computes with another rotary base, as version 4 does with files of version 5."""
    compute = verify._transformers_logits

    def with_another_base(folder: Path, tokens: Tensor, dtype: torch.dtype | None) -> Tensor:
        other = Path(shutil.copytree(folder, tmp_path / "other"))
        config = json.loads((other / "config.json").read_text())
        rope = {"rope_type": "default", "rope_theta": 37.0}
        (other / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
        return compute(other, tokens, dtype)

    monkeypatch.setattr(verify, "_transformers_logits", with_another_base)
    assert cli.main(["convert", str(model), str(tmp_path / "target"), "--verify", "1 2 3 4 5 6 7 8"]) == 2
    said = capsys.readouterr().err
    assert "ConversionError: --verify: found " in said and "expected at most 0.001 of the largest" in said
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize("size", ["nan", "inf", "-1", "0", "1e300"])
def test_bounds_that_are_none_are_refused(
    megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str
) -> None:
    assert cli.main(["convert", str(megatron), str(tmp_path / "target"), f"--shard-gb={size}"]) == 2
    assert "--shard-gb: found" in capsys.readouterr().err
    with pytest.raises(ConversionError, match="shard_bytes: found 0"):
        convert(megatron, tmp_path / "target", shard_bytes=0, console=QUIET)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_needs_no_other_one(model: Path, tmp_path: Path) -> None:
    for like in (tmp_path / "none", model):
        with pytest.raises(ConversionError, match=r"--like: found .*expected no --like for a Hugging Face folder"):
            convert(model, tmp_path / "target", like=like, console=QUIET)
    assert list(tmp_path.iterdir()) == []
