"""The training loop: prompts, rollout, score, batch, passes, update, publish; then eval, checkpoint and report."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum
from pathlib import Path

import torch
import torch.distributed as dist

from sdpg_megatron import objectives
from sdpg_megatron.checkpoint.changes import Change, check_same_run
from sdpg_megatron.checkpoint.state import RunState, fingerprint
from sdpg_megatron.checkpoint.store import CheckpointStore
from sdpg_megatron.config import RunConfig
from sdpg_megatron.data.cursor import Cursor
from sdpg_megatron.data.render import Renderer
from sdpg_megatron.errors import ConfigError, MismatchError
from sdpg_megatron.evaluation.problems import by_file
from sdpg_megatron.evaluation.results import Request, Results
from sdpg_megatron.mcore import parallel
from sdpg_megatron.mcore.learner import Learner
from sdpg_megatron.mcore.parallel import Ranks
from sdpg_megatron.objectives.base import StepContext
from sdpg_megatron.objectives.mismatch import DIFFERENCE
from sdpg_megatron.observe.alarms import Alarms
from sdpg_megatron.observe.cut import cut_folders
from sdpg_megatron.observe.metrics import Metric, merge, values
from sdpg_megatron.observe.progress import Progress
from sdpg_megatron.observe.report import plot_learning_curve
from sdpg_megatron.observe.summary import Summary, read_summary, write_summary
from sdpg_megatron.observe.writers import (
    METRICS_FILE,
    PROMPTS_FILE,
    JsonlWriter,
    MultiWriter,
    cut_records,
    open_writers,
    read_metrics,
)
from sdpg_megatron.records import ScoredGroup
from sdpg_megatron.rewards.shaping import Shaping
from sdpg_megatron.rollout.base import Bucket, Sampling
from sdpg_megatron.settings import dump
from sdpg_megatron.train.batch import StepBatch, build_step, make_samples, nobody, with_corrections
from sdpg_megatron.train.draws import draw_seed
from sdpg_megatron.train.engines import start_rollouts
from sdpg_megatron.train.evaluate import evaluate, metrics
from sdpg_megatron.train.export import EXPORT_FOLDER, export_weights, stream_weights
from sdpg_megatron.train.inputs import Inputs
from sdpg_megatron.train.interrupt import Interrupt
from sdpg_megatron.train.peers import describe_contexts, with_peers
from sdpg_megatron.train.presence import RunLock
from sdpg_megatron.train.rollouts import describe, with_shaping
from sdpg_megatron.train.selection import Judge, Selection, select

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
CHECKPOINT_FOLDER = "checkpoints"
EVAL_FOLDER = "eval"
"""Each evaluation's results, a folder a step."""


class Outcome(Enum):
    """How a call of `train` ended."""

    FINISHED = "finished"
    ALREADY_DONE = "already done"
    INTERRUPTED = "interrupted"


def train(config: RunConfig, inputs: Inputs) -> Outcome:
    """Run, or continue, the run that `config` describes. Every rank calls it once.

    A rank that fails leaves the others in a collective: start several with a launcher that ends them all, as torchrun
    does.

    Raises:
        SdpgError: whatever a user can put right; see `sdpg_megatron.errors`.
    """
    ranks = parallel.initialize(config.parallel, config.seed)
    store = CheckpointStore(config.run_dir / CHECKPOINT_FOLDER, ranks, config.checkpoint)
    with ExitStack() as stack:
        stack.callback(parallel.shutdown)
        _lock(config.run_dir, ranks, stack)
        model = fingerprint(config.model.path)
        newest = store.newest()
        changes: list[Change] = []
        if newest is not None:
            _, state = newest
            changes = check_same_run(state, config.model_dump(mode="json"), model)
            if state.step == config.steps and read_summary(config.run_dir) is not None:
                return Outcome.ALREADY_DONE
        store.sweep()
        trainer = Trainer(config, inputs, ranks, store, model)
        if newest is not None:
            trainer.resume(*newest, changes)
        return trainer.run(stack)


def _lock(run_dir: Path, ranks: Ranks, stack: ExitStack) -> None:
    """Claim the run's folder; where another run has it, every rank says so."""
    fault: ConfigError | None = None
    if ranks.is_main:
        try:
            stack.callback(RunLock(run_dir).close)
        except ConfigError as error:
            fault = error
    if (found := ranks.gather_all(fault)[0]) is not None:
        raise found


class Trainer:
    """One run on this rank: built from the configuration, continued from the newest checkpoint if there is one."""

    def __init__(
        self, config: RunConfig, inputs: Inputs, ranks: Ranks, store: CheckpointStore, fingerprint: str
    ) -> None:
        self.config, self.inputs, self.ranks, self.store = config, inputs, ranks, store
        self.fingerprint = fingerprint
        self.prompts = inputs.prompts
        self.cursor = Cursor(self.prompts.size, config.seed, config.data.shuffle)
        self.shaping = Shaping.build(config.reward, config.rollout.max_response_tokens)
        self.judge = Judge(config.selection, ranks)
        self.objective = objectives.build(config.objective, config.total_optimizer_steps)
        self.learner = Learner(config, inputs.arch, self.objective, ranks)
        self.step = 0
        self.saved: int | None = None
        """The step of the newest checkpoint, complete or being written."""
        self.changes: Sequence[Change] = ()
        self.seconds = 0.0
        self.baseline: Mapping[str, float] = {}
        self.evaluated = False
        self.phase_seconds: dict[str, float] = {}
        self.gated = config.rollout.mismatch_limit is None
        """Whether the rollout engine's log-probs were held against the trainer's."""

    def resume(self, checkpoint: Path, state: RunState, changes: Sequence[Change]) -> None:
        """Go on where a checkpoint was written; `changes` of the configuration since then are shown."""
        self.store.load(checkpoint, state, self.learner)
        self.saved, self.changes = state.step, changes
        self.step, self.seconds = state.step, state.seconds
        self.baseline, self.evaluated = state.baseline, state.evaluated
        self.cursor = Cursor.from_state(state.cursor, self.prompts.size)

    def run(self, stack: ExitStack) -> Outcome:
        """Train up to the configured step, then write what a finished run leaves behind.

        Args:
            stack: gets what has to be closed when the run ends, however it ends.
        """
        config, main = self.config, self.ranks.is_main
        self.progress = Progress(config.steps, done=self.step, enabled=main)
        stack.callback(self.progress.close)
        if main:
            cut_records(config.run_dir, self.step, evaluated=self.evaluated)
            cut_folders(config.run_dir / EVAL_FOLDER, self.step, evaluated=self.evaluated)
        self.writer = open_writers(config.run_dir) if main else MultiWriter([])
        stack.callback(self.writer.close)
        self.prompt_log = JsonlWriter(config.run_dir / PROMPTS_FILE) if main else None
        if self.prompt_log:
            stack.callback(self.prompt_log.close)
        self.alarms = Alarms(config.alarms, read_metrics(config.run_dir / METRICS_FILE) if main else [])
        if self._colocated:  # servers divide up the memory that they find
            self.learner.offload()
            self.ranks.barrier()
        self.rollouts = start_rollouts(config, self.inputs, self.ranks, self.progress.count)
        stack.callback(self.rollouts.close)
        self._announce()
        self._publish()
        if not self.evaluated and self.inputs.held_out:
            numbers = values(self._evaluate())
            self.baseline = self.baseline or numbers
            self._report(numbers)
        evaluated: Mapping[str, float] | None = None
        with Interrupt() as self.interrupt:
            while self.step < config.steps:
                metrics = self._train_step()
                if metrics is None:
                    return self._stop("before")
                self.store.advance()
                stop = self.step < config.steps and self._asked_to_stop()
                due = self._due(config.eval.every)
                self.evaluated = not (due and stop)  # who asks to stop may not wait for long: later, then
                evaluated = values(self._evaluate()) if due and not stop else None
                self._report({**values(metrics), **(evaluated or {})})
                if stop:
                    return self._stop("after")
                if self._due(config.checkpoint.every):
                    self._save()
        self.store.finish()
        self._finish(evaluated if evaluated is not None else values(self._evaluate()))
        return Outcome.FINISHED

    def _asked_to_stop(self) -> bool:
        """Whether any rank was: they stop together."""
        return any(self.ranks.gather_all(self.interrupt.requested))

    def _stop(self, where: str) -> Outcome:
        """Leave a checkpoint of the last whole step, `where`: before or after the one that was under way.

        Before the first step there is nothing to save: the optimizer has no state.
        """
        if self.step and self.saved != self.step:
            self._save()
        self.store.finish()
        told = f"stopped after step {self.step}" + (", the next was abandoned" if where == "before" else "")
        self.progress.message(f"{told}; the same command continues")
        return Outcome.INTERRUPTED

    def _train_step(self) -> dict[str, Metric] | None:
        """One rollout and the optimizer steps on it.

        None where the run was asked to stop before the first of these: then nothing has changed.
        """
        started = time.perf_counter()
        config, cursor = self.config, self.cursor.state()
        with self._phase("rollout"):
            selection = select(self._ask, config.rollout.prompts_per_step, self.judge, config.selection)
        if self._asked_to_stop():
            self.cursor = Cursor.from_state(cursor, self.prompts.size)
            return None
        groups = self._with_context(selection.kept)
        self._warn_of_shortage(selection)
        self._to_training()
        self.learner.begin(self.step)
        parts = [parallel.split_evenly(groups, i, config.optimizer.minibatches) for i in range(self._minibatches)]
        with self._phase("prepare"):
            batches = [self._prepare(part, self._context(number)) for number, part in enumerate(parts)]
        if self._asked_to_stop():
            self.cursor = Cursor.from_state(cursor, self.prompts.size)
            return None
        with self._phase("update"):
            updates = [self._update(batch, self._context(number)) for number, batch in enumerate(batches)]
        self._check_mismatch(merge(updates))
        self.step += 1
        if self.prompt_log:
            self.prompt_log.append(self.step, {"prompts": [scored.group.prompt.uid for scored in groups]})
        self._publish()
        seconds = time.perf_counter() - started
        self.seconds += seconds
        phases = {f"time/{name}": Metric(spent) for name, spent in self.phase_seconds.items()}
        self.phase_seconds.clear()
        tokens = sum(len(c.tokens) for scored in selection.asked for c in scored.group.completions)
        return {
            **describe(selection.asked, self.shaping),
            **(selection.metrics() if self.judge.active else {}),
            **describe_contexts(groups),
            **merge(updates),
            **phases,
            "time/step": Metric(seconds),
            "speed/tokens_per_second": Metric(tokens / seconds),
        }

    def _ask(self, count: int, number: int) -> list[ScoredGroup]:
        """Groups of the next `count` prompts, in round `number` of the step."""
        prompts = [self.prompts[i] for i in self.cursor.take(count)]
        return with_shaping(self.rollouts.run(prompts, self._sampling(number)), self.shaping)

    def _warn_of_shortage(self, selection: Selection) -> None:
        wanted = self.config.rollout.prompts_per_step
        if len(selection.kept) < wanted and self.ranks.is_main:
            reasons = ", ".join(f"{count} {reason}" for reason, count in selection.left_out.items() if count)
            logger.warning(
                "step %d: %d of %d groups kept after %d prompts in %d rounds, left out: %s",
                *(self.step, len(selection.kept), wanted, len(selection.asked), selection.rounds, reasons),
            )

    def _with_context(self, groups: list[ScoredGroup]) -> list[ScoredGroup]:
        """Give the teacher what it is to read, where that is not in the data."""
        if self.config.objective.context == "data":
            return groups
        renderer = Renderer(self.config.data, self.inputs.tokenizer)
        return with_peers(groups, renderer, self.config.objective.peer_reward, self.config.max_teacher_tokens)

    @property
    def _minibatches(self) -> int:
        return self.config.optimizer.minibatches

    def _context(self, minibatch: int) -> StepContext:
        return StepContext(self.step * self._minibatches + minibatch, self.config.total_optimizer_steps)

    def _prepare(self, groups: Sequence[ScoredGroup], context: StepContext) -> StepBatch:
        """Build one mini-batch, with what has to be computed before the rollout's weights change."""
        needs = self.objective.needs(context)
        batch = build_step(
            make_samples(
                groups,
                self.config.objective,
                taught=self.objective.taught if needs.teacher else nobody,
                outcome=needs.outcome,
                stop_ids=self.inputs.stop_ids,
            ),
            regularized=needs.reference or needs.every_token,
            micro_batch_size=self.config.optimizer.micro_batch_size,
            data_rank=self.ranks.data,
            data_size=self.ranks.data_size,
            length_multiple=self.ranks.tensor_size if self.config.parallel.sequence else 1,
            device=self.learner.device,
        )
        corrected = self.config.objective.correction != "none"
        if self._minibatches > 1 or corrected:
            batch = batch.with_micro_batches(self.learner.with_old_logprobs(batch.micro_batches))
        if corrected:
            batch = batch.with_micro_batches(with_corrections(batch.micro_batches, self.config.objective))
        if needs.reference:
            batch = batch.with_micro_batches(self.learner.with_reference(batch.micro_batches))
        if needs.teacher:
            batch = batch.with_micro_batches(self.learner.with_early_teacher(batch.micro_batches))
        return batch

    def _update(self, batch: StepBatch, context: StepContext) -> dict[str, Metric]:
        gated = self.config.objective.distill_average == "gated"
        scale = batch.distill_scale if gated else 1.0
        return self.learner.update(batch.micro_batches, StepContext(context.step, context.total_steps, scale))

    def _check_mismatch(self, metrics: Mapping[str, Metric]) -> None:
        """Hold the first step's rollout against its training, once: both have computed the same tokens' log-probs.

        Raises:
            MismatchError: on every rank, before the step's weights are published or saved.
        """
        limit = self.config.rollout.mismatch_limit
        if self.gated or limit is None or DIFFERENCE not in metrics or not metrics[DIFFERENCE].weight:
            return
        self.gated = True
        if not metrics[DIFFERENCE].value <= limit:
            raise MismatchError(self.step, metrics[DIFFERENCE].value, limit)

    def _weights(self) -> Iterator[Bucket]:
        """This replica's weights as the rollout engine wants them; every rank of the replica iterates."""
        served = self.config.rollout.sglang.dtype if self.config.rollout.engine == "sglang" else None
        return stream_weights(self.config, self.learner, getattr(torch, served) if served else None)

    def _publish(self) -> None:
        """Bring the weights to the rollout engine; where it shares the trainer's devices, it gets them back."""
        with self._phase("publish"):
            if self._colocated:
                self.learner.offload()
                self.rollouts.resume()
            self.rollouts.publish(self.step, self._weights)
            every = self.config.rollout.sglang.verify_every
            if every and self.step % every == 0:
                self.rollouts.verify(self.step, self._weights)

    def _to_training(self) -> None:
        """Take the devices from a rollout engine that shares them."""
        if self._colocated:
            with self._phase("switch"):
                self.rollouts.release()
                self.learner.onload()

    @property
    def _colocated(self) -> bool:
        return self.config.rollout.engine == "sglang" and self.config.rollout.sglang.colocated

    def _sampling(self, number: int) -> Sampling:
        """How round `number` of the step samples."""
        rollout = self.config.rollout
        return Sampling(
            n=rollout.group_size,
            max_tokens=rollout.max_response_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            experts=rollout.replay_routing,
            seed=draw_seed(
                self.config.seed,
                f"rollout/{self.step}/{number}" if number else f"rollout/{self.step}",
                self.ranks.replica,
            ),
        )

    def _evaluate(self) -> dict[str, Metric]:
        """Responses to the held-out prompts, kept in the run's folder; their numbers."""
        if self.inputs.held_out is None:
            return {}
        config = self.config
        files = by_file(self.inputs.held_out.prompts)
        with self._phase("eval"):
            problems = {
                name: evaluate(config, self.rollouts, prompts, self.ranks.replica) for name, prompts in files.items()
            }
            if self.ranks.is_main:
                model = f"{config.run_dir}, step {self.step}"
                request = Request.of(config, files, model=model, fingerprint=None)
                results = Results.start(config.run_dir / EVAL_FOLDER / f"step_{self.step:08d}", request)
                for name, found in problems.items():
                    results.write(name, found)
                results.finish()
        return metrics(config, problems)

    def _due(self, every: int) -> bool:
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def _announce(self) -> None:
        """Save the resolved configuration, and say what starts."""
        if not self.ranks.is_main:
            return
        (self.config.run_dir / CONFIG_FILE).write_text(dump(self.config), encoding="utf-8")
        r = self.ranks
        self.progress.message(
            f"{self.config.objective.name} on {self.config.model.path.name}: {self.prompts.describe()}, "
            f"{r.world} ranks (tensor {r.tensor_size} x pipeline {r.pipeline_size} x data {r.data_size}), "
            f"{self.learner.device.type}; "
            + ("a new run" if self.saved is None else f"continuing after step {self.step}")
        )
        if self.changes:
            self.progress.message(f"changed since the checkpoint: {'; '.join(map(str, self.changes))}")

    def _report(self, numbers: Mapping[str, float]) -> None:
        if not self.ranks.is_main:
            return
        found = self.alarms.update(self.step, numbers)
        self.writer.write(self.step, {**numbers, **found.metrics})
        self.progress.step(self.step, numbers)
        for warning in found.warnings:
            logger.warning("step %d: %s", self.step, warning)

    def _save(self) -> None:
        with self._phase("checkpoint"):
            self.store.save(
                self.learner,
                RunState(
                    step=self.step,
                    cursor=self.cursor.state(),
                    seconds=self.seconds,
                    baseline=self.baseline,
                    evaluated=self.evaluated,
                    config=self.config.model_dump(mode="json"),
                    model=self.fingerprint,
                ),
            )
        self.saved = self.step

    def _finish(self, evaluated: Mapping[str, float]) -> None:
        """Export the model, draw the curve, write the summary: in this order, as the summary marks a finished run."""
        config = self.config
        if config.checkpoint.export:
            export_weights(config, self.learner, config.run_dir / EXPORT_FOLDER)
        if self.ranks.is_main:
            plot_learning_curve(config.run_dir)
            summary = Summary(
                accuracy_before=self.baseline.get("eval/sampled_accuracy"),
                accuracy_after=evaluated.get("eval/sampled_accuracy"),
                greedy_before=self.baseline.get("eval/greedy_accuracy"),
                greedy_after=evaluated.get("eval/greedy_accuracy"),
                steps=self.step,
                seconds=round(self.seconds, 1),
            )
            write_summary(config.run_dir, summary)
            self.progress.message(str(summary))
        dist.barrier()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Show and time a part of the step."""
        self.progress.phase(name)
        started = time.perf_counter()
        yield
        self.phase_seconds[name] = self.phase_seconds.get(name, 0.0) + time.perf_counter() - started


def done_message(run_dir: Path) -> str:
    """What to tell the user about a run that was finished before."""
    return f"{run_dir}: done already ({read_summary(run_dir)}). A new run needs another run_dir."
