"""A step of SDPG with only PyTorch and transformers, as the baseline of benchmarks/step.py.

One model samples and learns. A frozen copy is the reference. Batches are padded, and the losses use the logits of all
response tokens at once. The loop is optimized: sequences of similar length share a batch, prompts skip the output
layer, the teacher reads only correct responses, attention has no mask if the padding comes last, and AdamW is fused.

Shapes: B sequences of a batch, S padded length, T response tokens of a batch, G those of correct responses, V
vocabulary.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpg_megatron.config import RunConfig
from sdpg_megatron.records import Prompt, ScoredGroup


@dataclass(frozen=True, slots=True)
class Response:
    """A sampled response and its advantage."""

    prompt: tuple[int, ...]
    teacher_prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    advantage: float


@dataclass(slots=True)
class PlainLoop:
    """The plain loop, with model and settings from a run's configuration."""

    config: RunConfig
    verifier: Callable[[Prompt, str], float]
    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of the last step by phase."""
    model: Any = field(init=False)
    reference: Any = field(init=False)
    tokenizer: Any = field(init=False)
    optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        path, how = self.config.model.path, self.config.optimizer
        dtype = getattr(torch, self.config.model.dtype)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(self.device)
        # Chat templates also use the padding token (SmolLM2's ends turns), but transformers does not train it.
        self.model.get_input_embeddings().padding_idx = None
        self.reference = copy.deepcopy(self.model).requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        norms = [p for p in self.model.parameters() if p.dim() < 2]
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": how.weight_decay}, {"params": norms, "weight_decay": 0.0}],
            lr=how.lr,
            betas=(how.beta1, how.beta2),
            eps=how.eps,
            fused=True,
        )

    def step(self, prompts: Sequence[Prompt], seed: int) -> list[Response]:
        """Sample, score and learn. Returns the responses."""
        self.seconds.clear()
        with self._timed("rollout"):
            sampled = self.sample(prompts, seed)
        with self._timed("score"):
            responses = self.score(prompts, sampled)
        self.learn(responses)
        return responses

    @torch.no_grad()
    def sample(self, prompts: Sequence[Prompt], seed: int) -> list[list[tuple[int, ...]]]:
        """Sample a group of responses per prompt, as tokens. Prompts of similar length share a batch."""
        rollout = self.config.rollout
        torch.manual_seed(seed)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].student_tokens))
        at_a_time = max(1, rollout.batch_size // rollout.group_size)
        found: dict[int, list[tuple[int, ...]]] = {}
        for start in range(0, len(order), at_a_time):
            batch = order[start : start + at_a_time]
            inputs = self.tokenizer.pad({"input_ids": [list(prompts[i].student_tokens) for i in batch]})
            output_BS = self.model.generate(
                input_ids=torch.tensor(inputs["input_ids"], device=self.device),
                attention_mask=torch.tensor(inputs["attention_mask"], device=self.device),
                do_sample=True,
                temperature=rollout.temperature,
                top_k=0,
                max_new_tokens=rollout.max_response_tokens,
                num_return_sequences=rollout.group_size,
            )
            rows = [self._cut(row) for row in output_BS[:, len(inputs["input_ids"][0]) :].tolist()]
            for place, i in enumerate(batch):
                found[i] = rows[place * rollout.group_size : (place + 1) * rollout.group_size]
        return [found[i] for i in range(len(prompts))]

    def _cut(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Cut after the first stop token."""
        stop = self.model.generation_config.eos_token_id
        stops = stop if isinstance(stop, list) else [stop]
        end = next((i for i, token in enumerate(tokens, start=1) if token in stops), len(tokens))
        return tuple(tokens[:end])

    def score(self, prompts: Sequence[Prompt], sampled: Sequence[Sequence[tuple[int, ...]]]) -> list[Response]:
        """Score responses and compute their advantages."""
        responses = []
        for prompt, group in zip(prompts, sampled, strict=True):
            texts = self.tokenizer.batch_decode(group, skip_special_tokens=True)
            rewards = torch.tensor([self.verifier(prompt, text) for text in texts])
            advantages = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6)
            responses += [
                Response(prompt.student_tokens, prompt.teacher_tokens, tokens, advantage)
                for tokens, advantage in zip(group, advantages.tolist(), strict=True)
            ]
        return responses

    def learn(self, responses: Sequence[Response]) -> tuple[float, float]:
        """Take one optimizer step. Returns the loss and the gradient norm before clipping."""
        total = sum(len(response.tokens) for response in responses)
        ordered = sorted(responses, key=lambda response: len(response.prompt) + len(response.tokens))
        size, loss = self.config.optimizer.micro_batch_size, 0.0
        for start in range(0, len(ordered), size):
            loss += self._backward(ordered[start : start + size], total)
        with self._timed("optimizer"):
            norm = clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss, float(norm)

    def _backward(self, batch: Sequence[Response], total: int) -> float:
        """Accumulate the gradients of a micro-batch. Returns its part of the loss."""
        labels_T = torch.tensor([token for r in batch for token in r.tokens], device=self.device)
        advantage_T = torch.tensor([r.advantage for r in batch for _ in r.tokens], device=self.device)
        texts = [(r.prompt, r.tokens) for r in batch]
        with self._timed("reference"), torch.no_grad():
            reference_T = _picked(self._logp(self.reference, texts), labels_T)
        right_T = advantage_T > 0
        with self._timed("teacher"), torch.no_grad():
            distill_enabled = [(r.teacher_prompt, r.tokens) for r in batch if r.advantage > 0]
            logq_GV = self._logp(self.model, distill_enabled) if distill_enabled else None
        with self._timed("student"):
            logp_TV = self._logp(self.model, texts)
            logprob_T = _picked(logp_TV, labels_T)
            ratio_T = (logprob_T - logprob_T.detach()).exp()
            loss_T = -advantage_T * ratio_T
            loss_T = loss_T + self.config.objective.alpha * (logprob_T - reference_T).square() / 2
            loss = loss_T.sum()
            if logq_GV is not None:
                logp_GV = logp_TV[right_T]
                kl_G = (logp_GV.exp() * (logp_GV - logq_GV)).sum(1)
                loss = loss + self.config.objective.beta * kl_G.sum()
            loss = loss / total
            loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _logp(self, model: Any, texts: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> Tensor:
        """Log-probs of the whole vocabulary at each response token, [T, V]."""
        tokens = [torch.tensor(prompt + response) for prompt, response in texts]
        tokens_BS = pad_sequence(tokens, batch_first=True).to(self.device)
        firsts = [b * tokens_BS.shape[1] + len(prompt) - 1 for b, (prompt, _) in enumerate(texts)]
        rows = [first + i for first, (_, response) in zip(firsts, texts, strict=True) for i in range(len(response))]
        hidden_BSH = model.base_model(tokens_BS, use_cache=False).last_hidden_state
        hidden_TH = hidden_BSH.flatten(0, 1)[torch.tensor(rows, device=self.device)]
        logits_TV = model.lm_head(hidden_TH).float() / self.config.rollout.temperature
        logp_TV: Tensor = logits_TV.log_softmax(1)
        return logp_TV

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started


def _picked(logp_TV: Tensor, labels_T: Tensor) -> Tensor:
    return logp_TV.gather(1, labels_T[:, None])[:, 0]


def responses_of(groups: Sequence[ScoredGroup]) -> list[Response]:
    """Convert groups that are already sampled and scored."""
    return [
        Response(prompt.student_tokens, prompt.teacher_tokens, tuple(completion.tokens.tolist()), advantage)
        for prompt, completions, advantages in ((s.group.prompt, s.group.completions, s.advantages) for s in groups)
        for completion, advantage in zip(completions, advantages, strict=True)
    ]
