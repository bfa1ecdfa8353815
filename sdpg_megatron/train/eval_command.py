"""``sdpg-megatron eval``: evaluate a model on held-out prompts over all ranks, into a folder of results."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from sdpg_megatron.checkpoint.state import fingerprint
from sdpg_megatron.config import ParallelConfig, RunConfig
from sdpg_megatron.data.dataset import PromptDataset
from sdpg_megatron.data.readers import find_files
from sdpg_megatron.data.source import load_prompts as load_all_prompts
from sdpg_megatron.errors import ConfigError
from sdpg_megatron.evaluation.problems import by_file
from sdpg_megatron.evaluation.results import Request, Results
from sdpg_megatron.evaluation.scores import Scores
from sdpg_megatron.mcore import parallel
from sdpg_megatron.mcore.compat import device
from sdpg_megatron.mcore.main_rank import on_main
from sdpg_megatron.mcore.parallel import ParallelState
from sdpg_megatron.observe.reading_progress import RowProgress
from sdpg_megatron.records import Prompt
from sdpg_megatron.train.engines import start_rollouts
from sdpg_megatron.train.eval_target import EvalTarget
from sdpg_megatron.train.evaluate import evaluate
from sdpg_megatron.train.export import export_checkpoint
from sdpg_megatron.train.inputs import ModelInputs, check_answers, warn_of
from sdpg_megatron.weights import read_folder

logger = logging.getLogger(__name__)


def load_prompts(config: RunConfig, inputs: ModelInputs) -> dict[str, list[Prompt]]:
    """Load the held-out prompts by data file, or by reasoning-gym task.

    Raises:
        ConfigError: no data file is named, or no problems of the tasks are held out.
        DataError: a row cannot be used, or all prompts of a file are too long.
    """
    if config.data.reasoning_gym.tasks:
        _, held_out = load_all_prompts(config.data, inputs.tokenizer, config.seed)
        if held_out is None:
            fix = "set it, for example to 64; training may have shown these problems"
            raise ConfigError("data.reasoning_gym.held_out", 0, "problems to evaluate on", fix)
        return by_file(held_out.prompts)
    if not config.data.eval:
        raise ConfigError("data.eval", (), "data files", "name them, for example data.eval=[aime24.jsonl]")
    main = os.environ.get("RANK", "0") == "0"
    with RowProgress(enabled=main) as progress:
        dataset = PromptDataset.load(
            config.data, config.data.eval, inputs.tokenizer, distill_enabled=False, on_rows=progress
        )
    if main and (dataset.dropped or dataset.truncated):
        counts = dataset.dropped, dataset.truncated, config.data.max_prompt_tokens, dataset.overlong
        logger.warning("%d problems left out and %d cut, as their prompts are over %d tokens, the first: %s", *counts)
    check_answers(config.reward.verifier, [dataset])
    if main:
        warn_of(dataset)
    files = by_file(dataset.prompts)
    paths = find_files(config.data.eval)
    if len(files) < len(paths):
        for path in paths:
            PromptDataset.load(config.data, [path], inputs.tokenizer, distill_enabled=False)  # raises for an empty one
    return files


def evaluate_target(
    eval_target: EvalTarget, inputs: ModelInputs, files: Mapping[str, list[Prompt]], folder: Path
) -> dict[str, Scores] | None:
    """Start or continue the evaluation of a model into `folder`. Every rank calls it once.

    Each rank is one replica, independent of the layout in training.

    Returns:
        Scores by data file on the main rank, None on the others.

    Raises:
        SdpgError: an error that the user can correct; see `sdpg_megatron.errors`.
    """
    parallel_config = eval_target.config.parallel
    alone = ParallelConfig(timeout=parallel_config.timeout, rendezvous_timeout=parallel_config.rendezvous_timeout)
    with ExitStack() as stack:
        stack.callback(parallel.shutdown)
        ranks = parallel.initialize(alone, eval_target.config.seed)
        eval_target = ranks.gather_all(eval_target)[0]  # ranks may see different checkpoints of an active run
        model = eval_target.config.model.path
        if eval_target.checkpoint is not None:
            model = export_checkpoint(eval_target.config, inputs.arch, eval_target.checkpoint)
            ranks = parallel.initialize(alone, eval_target.config.seed)
        config = for_evaluation(eval_target.config, model, folder)
        request = Request.of(config, files, model=eval_target.name, fingerprint=fingerprint(config.model.path))
        results = on_main(ranks, lambda: Results.start_or_continue(config.run_dir, request))
        missing = ranks.gather_all(results.missing)[0]
        if missing:
            _fill(config, inputs, ranks, {name: files[name] for name in missing}, results)
        return results.finish() if ranks.is_main else None


def _fill(
    config: RunConfig, inputs: ModelInputs, ranks: ParallelState, files: Mapping[str, list[Prompt]], results: Results
) -> None:
    """Evaluate on data files, writing the results of each when it is done."""
    served = config.rollout.engine == "sglang"
    dtype = getattr(torch, config.rollout.sglang.dtype or config.model.dtype) if served else None
    bucket_bytes = config.rollout.sglang.bucket_mib << 20
    with ExitStack() as stack:
        status = stack.enter_context(Console(stderr=True, quiet=not ranks.is_main).status("starting"))
        current = ""

        def on_progress(done: int, total: int) -> None:
            status.update(f"{current} {done}/{total}")

        rollouts = start_rollouts(config, inputs, ranks, on_progress)
        stack.callback(rollouts.close)
        rollouts.check_verifier(next(iter(files.values()))[0])
        where = device.training_device()
        rollouts.publish(
            0, lambda: read_folder(config.model.path, bucket_bytes=bucket_bytes, dtype=dtype, device=where)
        )
        for current, prompts in files.items():
            status.update(current)
            problems = evaluate(config, rollouts, prompts, ranks.replica, current)
            on_main(ranks, partial(results.write, current, problems))


def for_evaluation(config: RunConfig, model: Path, folder: Path) -> RunConfig:
    """Return the configuration with the weights at `model` and all files written to `folder`.

    Servers get the devices for themselves, as nothing is trained.
    """
    sglang = config.rollout.sglang
    if not sglang.urls:
        update = {
            "colocated": False,
            "first_gpu": sglang.first_gpu or 0,
            "transport": "shared" if sglang.transport == "broadcast" else sglang.transport,
        }
        sglang = sglang.model_copy(update=update)
    return config.model_copy(
        update={
            "run_dir": folder,
            "model": config.model.model_copy(update={"path": model}),
            "rollout": config.rollout.model_copy(update={"sglang": sglang}),
        }
    )
