"""What every rollout engine must do. Subclass `EngineContract`, say how an engine is made, and the suite runs.

The only other implementation that an engine is held against is a transformers forward pass over the same weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpg_megatron.errors import RolloutError, WeightError
from sdpg_megatron.records import Completion, Group, Prompt
from sdpg_megatron.rollout.base import Abandoned, Bucket, RolloutEngine, Sampling
from tests.tiny import EOS, TURN_END

MakeEngine = Callable[[], RolloutEngine]


def prompts_of(tokenizer: Any, *questions: str) -> list[Prompt]:
    """Student prompts of different lengths; the teacher's tokens would crash an engine that read them."""
    prompts = []
    for index, question in enumerate(questions):
        chat = [{"role": "user", "content": question}]
        tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        prompts.append(Prompt(f"contract:{index}", tuple(tokens), (10**9,), answer="1"))
    return prompts


def weights_of(model: Any) -> dict[str, Tensor]:
    """What a checkpoint of `model` holds: full tensors, a tied head left out."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def stream(weights: dict[str, Tensor], size: int = 7) -> Iterator[Bucket]:
    """A weight stream in buckets, in an order of its own."""
    items = sorted(weights.items(), reverse=True)
    for start in range(0, len(items), size):
        yield Bucket.of(items[start : start + size])


class EngineContract:
    """Needs the fixtures `model_folder` (a `write_tiny_model` folder) and `make_engine` (a new, unpublished engine)."""

    logprob_tolerance: ClassVar[float] = 1e-4
    unseeded: ClassVar[str] = ""
    """Why the engine's samples do not follow from the seed; empty where they do."""

    @pytest.fixture
    def model_folder(self) -> Path:
        raise NotImplementedError

    @pytest.fixture
    def make_engine(self) -> MakeEngine:
        raise NotImplementedError

    @pytest.fixture
    def tokenizer(self, model_folder: Path) -> Any:
        return AutoTokenizer.from_pretrained(model_folder)

    @pytest.fixture
    def prompts(self, tokenizer: Any) -> list[Prompt]:
        return prompts_of(tokenizer, "12 + 34?", "What is 5?", "Reply with only the number: 1 + 1 + 1 + 1 + 1", "?")

    @pytest.fixture
    def reference(self, model_folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()

    @pytest.fixture
    def weights(self, reference: Any) -> dict[str, Tensor]:
        return weights_of(reference)

    @pytest.fixture
    def engine(self, make_engine: MakeEngine, weights: dict[str, Tensor]) -> Iterator[RolloutEngine]:
        """An engine that serves version 1."""
        engine = make_engine()
        engine.publish(1, stream(weights))
        yield engine
        engine.close()

    # Versions

    def test_nothing_is_generated_before_a_publish(self, make_engine: MakeEngine, prompts: list[Prompt]) -> None:
        engine = make_engine()
        assert engine.weight_version == -1
        with pytest.raises(RolloutError):
            engine.generate(prompts, Sampling(n=2, max_tokens=2))
        engine.close()

    def test_every_completion_carries_the_version_of_its_weights(
        self, engine: RolloutEngine, prompts: list[Prompt], weights: dict[str, Tensor]
    ) -> None:
        assert engine.weight_version == 1
        assert versions(engine.generate(prompts, Sampling(n=2, max_tokens=2))) == {1}
        engine.publish(5, stream(weights))
        assert engine.weight_version == 5
        assert versions(engine.generate(prompts, Sampling(n=2, max_tokens=2))) == {5}

    # What a completion says

    @pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.6), (0.0, 1.0)])
    def test_logprobs_are_those_of_a_full_forward(
        self, engine: RolloutEngine, prompts: list[Prompt], reference: Any, temperature: float, top_p: float
    ) -> None:
        """At the sampling temperature, before top-p, for every token with the last; greedy counts as temperature 1."""
        sampling = Sampling(n=3, max_tokens=12, temperature=temperature, top_p=top_p, seed=3)
        for prompt, completion in completions(engine.generate(prompts, sampling)):
            logits_NV = response_logits(reference, prompt, completion) / (temperature or 1.0)
            expected_N = logits_NV.log_softmax(-1)[range(len(completion.tokens)), completion.tokens]
            found_N = torch.tensor(completion.logprobs)
            torch.testing.assert_close(found_N, expected_N, atol=self.logprob_tolerance, rtol=0)

    def test_whole_groups_in_the_order_of_the_prompts(self, engine: RolloutEngine, prompts: list[Prompt]) -> None:
        groups = engine.generate(prompts, Sampling(n=3, max_tokens=4))
        assert [group.prompt for group in groups] == prompts
        assert all(len(group.completions) == 3 for group in groups)
        assert len({tuple(c.tokens) for _, c in completions(groups)}) > len(prompts), "samples must differ"
        assert engine.generate([], Sampling(n=3, max_tokens=4)) == []

    def test_stop_and_length(
        self, engine: RolloutEngine, prompts: list[Prompt], tokenizer: Any, weights: dict[str, Tensor]
    ) -> None:
        """Every stop id of the model ends a response and stays its last token; the rest end at the length."""
        stops = set(tokenizer.convert_tokens_to_ids([EOS, TURN_END]))
        engine.publish(2, stream(with_possible(weights, stops)))
        limit = 16
        ended_by = set()
        for _, completion in completions(engine.generate(prompts, Sampling(n=100, max_tokens=limit))):
            *body, last = completion.tokens.tolist()
            assert len(completion.logprobs) == len(completion.tokens) <= limit
            assert (completion.tokens.dtype, completion.logprobs.dtype) == (np.int32, np.float32)
            assert not stops & set(body)
            assert completion.finish_reason == ("stop" if last in stops else "length")
            assert completion.finish_reason == "stop" or len(completion.tokens) == limit
            ended_by.add(last if last in stops else "length")
        assert ended_by == stops | {"length"}

    def test_text_has_no_special_tokens(
        self, engine: RolloutEngine, prompts: list[Prompt], tokenizer: Any, weights: dict[str, Tensor]
    ) -> None:
        stops = set(tokenizer.convert_tokens_to_ids([EOS, TURN_END]))
        engine.publish(2, stream(with_possible(weights, stops)))
        found = completions(engine.generate(prompts, Sampling(n=100, max_tokens=16)))
        assert any(completion.finish_reason == "stop" for _, completion in found)
        for _, completion in found:
            assert completion.text == tokenizer.decode(completion.tokens, skip_special_tokens=True)
            assert EOS not in completion.text and TURN_END not in completion.text

    # Sampling

    def test_the_seed_decides(self, engine: RolloutEngine, prompts: list[Prompt]) -> None:
        if self.unseeded:
            pytest.skip(self.unseeded)
        first = engine.generate(prompts, Sampling(n=2, max_tokens=6, seed=1))
        assert engine.generate(prompts, Sampling(n=2, max_tokens=6, seed=1)) == first
        assert engine.generate(prompts, Sampling(n=2, max_tokens=6, seed=2)) != first

    def test_greedy_takes_the_most_probable_token(
        self, engine: RolloutEngine, prompts: list[Prompt], reference: Any
    ) -> None:
        groups = engine.generate(prompts, Sampling(n=2, max_tokens=8, temperature=0))
        for prompt, completion in completions(groups):
            logits_NV = response_logits(reference, prompt, completion)
            assert completion.tokens.tolist() == logits_NV.argmax(-1).tolist()

    def test_sampling_is_from_the_models_own_distribution(
        self, engine: RolloutEngine, prompts: list[Prompt], reference: Any
    ) -> None:
        """No top-k, no penalty: each first token comes up about as often as its probability says."""
        n = 2000
        (group,) = engine.generate(prompts[:1], Sampling(n=n, max_tokens=1, temperature=1.5))
        counts_V = torch.bincount(
            torch.tensor([c.tokens[0] for c in group.completions]), minlength=reference.config.vocab_size
        )
        logits_V = response_logits(reference, prompts[0], group.completions[0])[0]
        expected_V = n * (logits_V / 1.5).softmax(-1)
        likely = expected_V >= 5
        statistic = ((counts_V - expected_V) ** 2 / expected_V)[likely].sum()
        rest, expected_rest = counts_V[~likely].sum(), expected_V[~likely].sum()
        # A chi-square variable of k degrees has mean k and variance 2k; five standard deviations.
        degrees = int(likely.sum())
        assert statistic < degrees + 5 * (2 * degrees) ** 0.5
        assert abs(rest - expected_rest) < 5 * expected_rest**0.5 + 1

    def test_top_p_keeps_to_the_nucleus(self, engine: RolloutEngine, prompts: list[Prompt], reference: Any) -> None:
        for prompt, completion in completions(engine.generate(prompts, Sampling(n=8, max_tokens=6, top_p=0.3))):
            probs_NV = response_logits(reference, prompt, completion).softmax(-1)
            for token, probs_V in zip(completion.tokens, probs_NV, strict=True):
                assert probs_V[probs_V > probs_V[token]].sum() < 0.3 + 1e-4

    # Weights

    def test_published_weights_are_the_ones_that_answer(
        self, engine: RolloutEngine, prompts: list[Prompt], reference: Any, weights: dict[str, Tensor]
    ) -> None:
        """Every single weight counts, and publishing the first ones again brings the first answers back."""
        sampling = Sampling(n=1, max_tokens=4, temperature=0)
        before = engine.generate(prompts, sampling)
        noise = torch.Generator().manual_seed(0)
        changed = {name: w + 0.02 * torch.randn(w.shape, generator=noise) for name, w in weights.items()}
        engine.publish(2, stream(changed))
        other = copy.deepcopy(reference)
        other.load_state_dict(changed, strict=False)
        for prompt, completion in completions(engine.generate(prompts, sampling)):
            logprobs_NV = response_logits(other, prompt, completion).log_softmax(-1)
            expected_N = logprobs_NV[range(len(completion.tokens)), completion.tokens]
            found_N = torch.tensor(completion.logprobs)
            torch.testing.assert_close(found_N, expected_N, atol=self.logprob_tolerance, rtol=0)
        engine.publish(1, stream(weights))
        after = engine.generate(prompts, sampling)
        assert_same(before, after)

    @pytest.mark.parametrize("fault", ["missing", "unknown", "shape"])
    def test_a_faulty_stream_is_an_error_and_stops_the_engine(
        self, engine: RolloutEngine, prompts: list[Prompt], weights: dict[str, Tensor], fault: str
    ) -> None:
        faulty, name = dict(weights), "model.layers.1.mlp.up_proj.weight"
        match fault:
            case "missing":
                del faulty[name]
            case "unknown":
                faulty[name.replace("up_proj", "upp_proj")] = faulty[name]
            case "shape":
                faulty[name] = faulty[name][:-1]
        with pytest.raises(WeightError, match=name):
            engine.publish(2, stream(faulty))
        assert engine.weight_version != 2
        with pytest.raises(RolloutError):
            engine.generate(prompts, Sampling(n=1, max_tokens=2))
        engine.publish(3, stream(weights))
        assert versions(engine.generate(prompts, Sampling(n=1, max_tokens=2))) == {3}

    def test_a_stream_that_breaks_off_stops_the_engine(
        self, engine: RolloutEngine, prompts: list[Prompt], weights: dict[str, Tensor]
    ) -> None:
        def broken() -> Iterator[Bucket]:
            yield next(stream(weights))
            raise ConnectionError("the trainer is gone")

        with pytest.raises(ConnectionError):
            engine.publish(2, broken())
        with pytest.raises(RolloutError):
            engine.generate(prompts, Sampling(n=1, max_tokens=2))

    # Manners

    def test_a_generation_that_is_to_stop_is_abandoned(self, engine: RolloutEngine, prompts: list[Prompt]) -> None:
        """It leaves no trace: the engine goes on as if it had not been asked."""
        sampling = Sampling(n=1, max_tokens=4, temperature=0)
        before, state = engine.generate(prompts, sampling), torch.get_rng_state()
        with pytest.raises(Abandoned):
            engine.generate(prompts, Sampling(n=4, max_tokens=100), stop=lambda: True)
        assert torch.equal(torch.get_rng_state(), state)
        assert_same(before, engine.generate(prompts, sampling, stop=lambda: False))

    def test_inputs_and_the_global_random_state_stay_as_they_were(
        self, engine: RolloutEngine, prompts: list[Prompt], weights: dict[str, Tensor]
    ) -> None:
        given, kept = list(prompts), {name: tensor.clone() for name, tensor in weights.items()}
        state = torch.get_rng_state()
        engine.publish(2, stream(weights))
        engine.generate(prompts, Sampling(n=2, max_tokens=3))
        assert torch.equal(torch.get_rng_state(), state)
        assert prompts == given
        assert all(torch.equal(weights[name], kept[name]) for name in kept)

    def test_the_engine_holds_weights_of_its_own(
        self, engine: RolloutEngine, prompts: list[Prompt], weights: dict[str, Tensor]
    ) -> None:
        sampling = Sampling(n=1, max_tokens=4, temperature=0)
        before = engine.generate(prompts, sampling)
        for tensor in weights.values():
            tensor.zero_()
        assert_same(before, engine.generate(prompts, sampling))

    def test_a_closed_engine_does_nothing(
        self, engine: RolloutEngine, prompts: list[Prompt], weights: dict[str, Tensor]
    ) -> None:
        engine.close()
        engine.close()
        with pytest.raises(RolloutError):
            engine.generate(prompts, Sampling(n=1, max_tokens=2))
        with pytest.raises(RolloutError):
            engine.publish(2, stream(weights))


def completions(groups: Sequence[Group]) -> list[tuple[Prompt, Completion]]:
    return [(group.prompt, completion) for group in groups for completion in group.completions]


def assert_same(before: Sequence[Group], after: Sequence[Group]) -> None:
    """The same tokens; log-probs up to rounding, which may depend on what else is in the batch."""
    for (_, old), (_, new) in zip(completions(before), completions(after), strict=True):
        assert old.tokens.tolist() == new.tokens.tolist()
        assert old.logprobs == pytest.approx(new.logprobs, abs=1e-5)


def versions(groups: Sequence[Group]) -> set[int]:
    return {completion.weight_version for _, completion in completions(groups)}


@torch.no_grad()
def response_logits(model: Any, prompt: Prompt, completion: Completion) -> Tensor:
    """float32 [N, V]: the logits that each response token was chosen from, by one unpadded forward pass."""
    tokens_1S = torch.tensor([[*prompt.student_tokens, *completion.tokens]])
    first = len(prompt.student_tokens) - 1
    logits_NV: Tensor = model(tokens_1S, use_cache=False).logits[0, first:-1].float()
    return logits_NV


def with_possible(weights: dict[str, Tensor], tokens: set[int]) -> dict[str, Tensor]:
    """The weights with zero head rows for `tokens`: a logit of 0, so about one in 400 in every context."""
    changed = {name: tensor.clone() for name, tensor in weights.items()}
    head = changed["lm_head.weight" if "lm_head.weight" in changed else "model.embed_tokens.weight"]
    head[sorted(tokens)] = 0
    return changed
