"""Evaluate held-out prompts over all replicas, in training and for ``sdpg-megatron eval``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

from sdpg_megatron.config import RunConfig
from sdpg_megatron.evaluation.estimators import draw_sizes
from sdpg_megatron.evaluation.problems import Problem
from sdpg_megatron.evaluation.results import response_limit
from sdpg_megatron.evaluation.scores import per_problem
from sdpg_megatron.observe.metrics import Metric, Reduction
from sdpg_megatron.records import Prompt
from sdpg_megatron.rewards.failures import check_failures
from sdpg_megatron.rollout.base import Sampling
from sdpg_megatron.train.rollouts import Rollouts
from sdpg_megatron.train.seeds import draw_seed

NAMES = {"pass@1": "sampled_accuracy", "greedy": "greedy_accuracy"}
"""Names of metrics that differ from their quantity's name."""


def evaluate(
    config: RunConfig, rollouts: Rollouts, prompts: Sequence[Prompt], data_rank: int, name: str = ""
) -> list[Problem]:
    """Score sampled responses, always from the same seed, and the greedy one to each prompt of a data file.

    Every rank calls it and gets the same list, in the order of the prompts.

    Args:
        name: data file, for errors.

    Raises:
        VerifierError: more verifier calls failed than `reward.failure_limit` allows; on every rank.
    """
    eval_config, length = config.eval, response_limit(config)
    seed = draw_seed(config.seed, "eval", data_rank)
    sampling = Sampling(eval_config.samples, length, eval_config.temperature, eval_config.top_p, seed)
    sampled = rollouts.run(prompts, sampling, extract=True)
    limit, where = config.reward.failure_limit, f"evaluation on {name}" if name else "evaluation"
    check_failures(where, sampled, limit)
    greedy = rollouts.run(prompts, Sampling(1, length, 0.0), extract=True)
    check_failures(where, [*sampled, *greedy], limit)
    return [Problem.of(*pair, responses=eval_config.responses) for pair in zip(sampled, greedy, strict=True)]


def metrics(config: RunConfig, files: Mapping[str, Sequence[Problem]]) -> dict[str, Metric]:
    """Metrics ``eval/...`` over all problems, and ``eval/<file>/...`` for each of several data files."""
    everything = {"eval": list(chain.from_iterable(files.values()))}
    parts = {f"eval/{name}": problems for name, problems in files.items()} if len(files) > 1 else {}
    ks = config.eval.k or draw_sizes(config.eval.samples)
    found: dict[str, Metric] = {}
    for prefix, problems in {**everything, **parts}.items():
        for quantity, values_P in per_problem(problems, ks).items():
            name = NAMES.get(quantity, quantity.replace("@", "_at_"))
            found[f"{prefix}/{name}"] = Metric(float(values_P.mean()))
        failures = sum(problem.sampled.failures + problem.greedy.failures for problem in problems)
        found[f"{prefix}/failures"] = Metric(float(failures), Reduction.SUM)
    return found
