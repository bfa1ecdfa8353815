"""The embedded engine: the contract, and what is its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpg_megatron.errors import NumericsError, WeightError
from sdpg_megatron.records import Prompt
from sdpg_megatron.rollout.base import Abandoned, RolloutEngine, Sampling
from sdpg_megatron.rollout.hf import HFEngine
from tests.rollout.contract import EngineContract, MakeEngine, completions, stream
from tests.tiny import Family, add_sampling_defaults, write_tiny_model

CPU = torch.device("cpu")


def build(folder: Path, batch_size: int = 32) -> HFEngine:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return HFEngine(folder, batch_size=batch_size, device=CPU, dtype=torch.float32, tokenizer=tokenizer)


@pytest.fixture(scope="module", params=[("qwen3", True), ("llama", False)], ids=["qwen3-tied", "llama-untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose generation config carries sampling defaults, as released models do."""
    family: Family
    family, tied = request.param
    folder = write_tiny_model(tmp_path_factory.mktemp(family), family, tied=tied, seed=1, layers=2)
    add_sampling_defaults(folder)
    return folder


class TestHFEngine(EngineContract):
    @pytest.fixture
    def model_folder(self, folder: Path) -> Path:
        return folder

    @pytest.fixture
    def make_engine(self, folder: Path) -> MakeEngine:
        return lambda: build(folder)

    def test_the_stream_is_the_checkpoints(self, make_engine: MakeEngine, model_folder: Path) -> None:
        """Exactly the names of model.safetensors: no buffers, and a tied head only under its one name."""
        engine = make_engine()
        engine.publish(1, stream(load_file(model_folder / "model.safetensors")))
        assert engine.weight_version == 1

    def test_batch_size_does_not_change_what_a_prompt_gets(
        self, model_folder: Path, prompts: list[Prompt], weights: dict[str, Tensor]
    ) -> None:
        """Padding is invisible: the greedy responses of one prompt at a time, and of all together, agree."""
        found = []
        prompts = [*prompts, Prompt("one token", (7,), (7,), answer="1")]
        for batch_size in (1, 3, 64):
            engine = build(model_folder, batch_size)
            engine.publish(1, stream(weights))
            found.append(completions(engine.generate(prompts, Sampling(n=2, max_tokens=6, temperature=0))))
        for (_, alone), *others in zip(*found, strict=True):
            for _, together in others:
                assert alone.tokens.tolist() == together.tokens.tolist()
                assert alone.logprobs == pytest.approx(together.logprobs, abs=1e-4)

    def test_it_stops_between_two_tokens(self, engine: RolloutEngine, prompts: list[Prompt]) -> None:
        asked = iter([False, False, True])  # one question more would be an error
        with pytest.raises(Abandoned):
            engine.generate(prompts, Sampling(n=2, max_tokens=20, temperature=0), stop=lambda: next(asked))
        assert next(asked, None) is None

    def test_a_faulty_stream_is_read_to_its_end(self, engine: RolloutEngine, weights: dict[str, Tensor]) -> None:
        """Other ranks may take part in making it; all faults are named at once, with the names they may mean."""
        faulty = {name.replace("input_layernorm", "input_layer_norm"): weight for name, weight in weights.items()}
        buckets = stream(faulty)
        with pytest.raises(WeightError) as caught:
            engine.publish(2, buckets)
        assert next(buckets, None) is None
        name = "model.layers.1.input_layernorm.weight"
        assert f"input_layer_norm.weight is unknown; did you mean '{name}'" in str(caught.value)
        assert f"{name} is missing" in str(caught.value)

    def test_a_weight_that_comes_twice_is_an_error(self, engine: RolloutEngine, weights: dict[str, Tensor]) -> None:
        with pytest.raises(WeightError, match=r"model\.norm\.weight came twice"):
            engine.publish(2, [list(weights.items()), [("model.norm.weight", weights["model.norm.weight"])]])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(folder: Path, temperature: float) -> None:
    """Weights that are finite, and too large for what is computed from them."""
    engine = build(folder)
    weights = load_file(folder / "model.safetensors")
    head = "lm_head.weight" if "lm_head.weight" in weights else "model.embed_tokens.weight"
    large = {"model.norm.weight": weights["model.norm.weight"] * 1e38, head: weights[head] * 1e4}
    engine.publish(1, stream(weights | large))
    prompt = Prompt("one", (7, 8, 9), (7,), answer="1")
    with pytest.raises(NumericsError, match=r"^rollout: found logits that are not finite at response token 1, .*Fix: "):
        engine.generate([prompt], Sampling(n=2, max_tokens=6, temperature=temperature))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_are_published_under_the_names_of_checkpoints(tmp_path: Path, family: Family) -> None:
    folder = write_tiny_model(tmp_path, family, tied=False, seed=1, layers=2)
    engine = build(folder)
    engine.publish(1, stream(load_file(folder / "model.safetensors")))
    group = engine.generate([Prompt("one", (7, 8, 9), (7,), answer="1")], Sampling(n=2, max_tokens=6, temperature=0))[0]
    completion = group.completions[0]
    tokens = torch.tensor([[7, 8, 9, *completion.tokens]])
    with torch.no_grad():
        logprobs = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits.log_softmax(-1)
    expected = logprobs[0, 2:-1].gather(1, tokens[0, 3:, None]).squeeze(1)
    assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_building_leaves_the_global_random_state(folder: Path) -> None:
    state = torch.get_rng_state()
    build(folder)
    assert torch.equal(torch.get_rng_state(), state)
