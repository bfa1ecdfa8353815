"""One made batch for the tests of verl's engine: in verl's form, and by hand in this package's."""

from __future__ import annotations

import random
from typing import Any

import torch
from megatron.core import parallel_state

from sdpg_megatron.records import MicroBatch, SequenceBatch

TEMPERATURE, DISTILLED_ADVANTAGE = 0.8, 0.5
SEQUENCES, PADDING = 8, 7
"""The last sequence is a synthetic one, as verl's trainer adds to fill a batch: none of its tokens counts."""


def drawn_rows(vocab: int) -> list[dict[str, Any]]:
    """Samples as verl's agent loop gives them: two responses each to four prompts, one of them with a tool's output."""
    draw = random.Random(5)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(3, vocab) for _ in range(count)]

    def logprobs(count: int) -> torch.Tensor:
        return torch.tensor([draw.uniform(-6.5, -5.5) for _ in range(count)])

    rows = []
    for number in range(SEQUENCES):
        prompt, response = tokens(draw.randint(3, 9)), tokens(draw.randint(1, 11))
        if number == 2:
            response = tokens(9)
        mask = torch.ones(len(response), dtype=torch.int64)
        if number == 2:
            mask[3:6] = 0
        if number == PADDING:
            prompt, response, mask = [2], [2], torch.zeros(1, dtype=torch.int64)
        advantage = (DISTILLED_ADVANTAGE if number % 3 else -0.8) * mask
        rows.append(
            {
                "prompts": torch.tensor(prompt),
                "responses": torch.tensor(response),
                "input_ids": torch.tensor(prompt + response),
                "position_ids": torch.arange(len(prompt + response)),
                "response_mask": mask,
                "loss_mask": mask,
                "advantages": advantage,
                "old_log_probs": logprobs(len(response)),
                "ref_log_prob": logprobs(len(response)),
                "rollout_log_probs": logprobs(len(response)),
                "multi_modal_inputs": {},
                "extra_info": {"index": number, "teacher_prompt_ids": tokens(4) + prompt},
            }
        )
    return rows


def batch_of(rows: list[dict[str, Any]], per_micro_batch: int = 2) -> Any:
    """TensorDict of verl's actor update, as its worker completes it."""
    from verl.utils import tensordict_utils as tu

    data = tu.list_of_dict_to_tensordict(rows)
    everywhere = len(rows) * parallel_state.get_data_parallel_world_size()
    tu.assign_non_tensor(
        data,
        temperature=TEMPERATURE,
        global_batch_size=everywhere,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=per_micro_batch,
        calculate_entropy=True,
        compute_loss=False,
    )
    return data


def padded_batch(rows: list[dict[str, Any]]) -> MicroBatch:
    """The same samples, written by hand for this package's own forward step: padded sequences, all weights 1."""

    def padded(sequences: list[list[int]]) -> torch.Tensor:
        longest = max(map(len, sequences)) + max(map(len, sequences)) % 2
        return torch.tensor([sequence + [0] * (longest - len(sequence)) for sequence in sequences])

    def chosen(number: int) -> list[int]:
        return rows[number]["response_mask"].nonzero().squeeze(1).tolist()

    def predicting(sequences: torch.Tensor, prompts: list[list[int]], numbers: list[int]) -> torch.Tensor:
        width = sequences.shape[1]
        return torch.tensor(
            [
                line * width + len(prompt) - 1 + place
                for line, (prompt, number) in enumerate(zip(prompts, numbers, strict=True))
                for place in chosen(number)
            ]
        )

    def per_token(name: str) -> torch.Tensor:
        return torch.cat([rows[number][name][chosen(number)] for number in range(len(rows))])

    every = list(range(len(rows)))
    distilled = [n for n in every if chosen(n) and rows[n]["advantages"].max() > 0]
    prompts = [row["prompts"].tolist() for row in rows]
    responses = [row["responses"].tolist() for row in rows]
    privileged = [rows[n]["extra_info"]["teacher_prompt_ids"] for n in distilled]
    student = padded([prompts[n] + responses[n] for n in every])
    teacher = padded([prompt + responses[n] for prompt, n in zip(privileged, distilled, strict=True)])
    advantages = per_token("advantages").float()
    gates = (advantages > 0).float()
    return MicroBatch(
        student=SequenceBatch(student, predicting(student, prompts, every)),
        teacher=SequenceBatch(teacher, predicting(teacher, privileged, distilled)),
        gated_rows_G=gates.nonzero().squeeze(1),
        labels_T=per_token("responses"),
        sequence_T=torch.cat([torch.full((len(chosen(n)),), n) for n in every]),
        advantages_T=advantages,
        gates_T=gates,
        weights_T=torch.ones(len(gates)),
        rollout_logprobs_T=per_token("rollout_log_probs"),
        old_logprobs_T=per_token("old_log_probs"),
        reference_logprobs_T=per_token("ref_log_prob"),
    )
