"""Training loop: publish, rollout, score, batch, passes, update; then evaluate, checkpoint and report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from enum import Enum
from pathlib import Path

from sdpg_megatron import objectives
from sdpg_megatron.batching.peer_context import describe_contexts
from sdpg_megatron.checkpoint.branch import BranchRequest
from sdpg_megatron.checkpoint.state import CHECKPOINT_FOLDER
from sdpg_megatron.checkpoint.store import CheckpointStore
from sdpg_megatron.config import RunConfig
from sdpg_megatron.data.cursor import Cursor
from sdpg_megatron.errors import NumericsError, SdpgError, VerifierError, WriteError
from sdpg_megatron.mcore import parallel
from sdpg_megatron.mcore.main_rank import on_main
from sdpg_megatron.mcore.parallel import ParallelState
from sdpg_megatron.mcore.policy_trainer import PolicyTrainer
from sdpg_megatron.observe.metrics import Metric, values
from sdpg_megatron.observe.progress import EVAL_SECONDS, Progress
from sdpg_megatron.observe.report import plot_learning_curve
from sdpg_megatron.observe.run_log import RunLog
from sdpg_megatron.observe.summary import Summary, read_summary, write_summary
from sdpg_megatron.observe.writers import METRICS_FILE, last_value
from sdpg_megatron.process import streams
from sdpg_megatron.rollout.base import Abandoned
from sdpg_megatron.runtime.interrupt import Interrupt
from sdpg_megatron.runtime.run_lock import RunLock
from sdpg_megatron.runtime.watchdog import Watchdog
from sdpg_megatron.train.collect import Collector
from sdpg_megatron.train.export import export_weights
from sdpg_megatron.train.final_report import describe_run
from sdpg_megatron.train.held_out import HeldOut, evaluations_after
from sdpg_megatron.train.inputs import Inputs, load_inputs, load_run_model
from sdpg_megatron.train.journal import Journal
from sdpg_megatron.train.phases import Phases
from sdpg_megatron.train.run_dir import EXPORT_FOLDER, LOG_FOLDER, make_run_dir
from sdpg_megatron.train.run_fingerprint import RunFingerprint, find_run_fingerprint
from sdpg_megatron.train.selection import Selection
from sdpg_megatron.train.serving import Serving
from sdpg_megatron.train.start import Start, find_start
from sdpg_megatron.train.state import TrainState
from sdpg_megatron.train.update import PolicyUpdater


class RunOutcome(Enum):
    """Outcome of a call of `train`."""

    FINISHED = "finished"
    ALREADY_DONE = "already done"
    INTERRUPTED = "interrupted"


def train(config: RunConfig, branch_from: BranchRequest | None = None) -> RunOutcome:
    """Start or continue a run. Every rank calls it once.

    A rank that fails leaves the others waiting in a collective: start several ranks with a launcher that ends them all,
    as torchrun does. Without one, their watchdogs end them.

    Args:
        branch_from: start from this checkpoint of another run, unless the run already has a checkpoint.

    Raises:
        SdpgError: an error that the user can correct; see `sdpg_megatron.errors`.
    """
    with Interrupt() as interrupt, Watchdog(config.watchdog) as watchdog, ExitStack() as stack:
        model = load_run_model(config)
        make_run_dir(config.run_dir)
        ranks = parallel.initialize(config.parallel, config.seed)
        stack.callback(parallel.shutdown)
        stack.enter_context(watchdog.monitor_ranks(ranks))
        inputs = load_inputs(config, model, ranks)
        interrupt.defer()
        store = CheckpointStore(config.run_dir / CHECKPOINT_FOLDER, ranks, config.checkpoint)
        _claim(config.run_dir, ranks, stack)
        fingerprint = find_run_fingerprint(config, inputs.prompts, ranks)
        start = on_main(ranks, lambda: find_start(config, branch_from, lambda: fingerprint.model, fingerprint.data))
        if start.done:
            return RunOutcome.ALREADY_DONE
        store.sweep()
        objective = objectives.build_objective(config.objective, config.total_optimizer_steps)
        policy_trainer = PolicyTrainer(config, inputs.arch, objective, ranks)
        if start.checkpoint is not None and start.state is not None:
            store.load(start.checkpoint, start.state, policy_trainer)
            policy_trainer.check_weights(f"checkpoint of step {start.state.step}")
        state = TrainState.of(start, config, inputs.prompts)
        if any(ranks.gather_all(interrupt.requested)):
            return RunOutcome.INTERRUPTED  # nothing new to save
        trainer = Trainer(config, inputs, policy_trainer, store, state, fingerprint, interrupt, watchdog, stack)
        trainer.announce(start)
        return trainer.run()


def _claim(run_dir: Path, ranks: ParallelState, stack: ExitStack) -> None:
    """Lock the run's folder and log to it. Every rank raises if another run holds the lock."""

    def claim() -> None:
        stack.callback(RunLock(run_dir).close)
        stack.enter_context(RunLog(run_dir))

    on_main(ranks, claim)
    streams.keep_going(run_dir / LOG_FOLDER / f"rank-{ranks.rank}.log")


class Trainer:
    """The rest of a run, on this rank."""

    def __init__(
        self,
        config: RunConfig,
        inputs: Inputs,
        policy_trainer: PolicyTrainer,
        store: CheckpointStore,
        state: TrainState,
        fingerprint: RunFingerprint,
        interrupt: Interrupt,
        watchdog: Watchdog,
        stack: ExitStack,
    ) -> None:
        """
        Args:
            state: training state at the policy trainer's weights.
            stack: closes the run's resources.
        """
        self.config, self.inputs, self.policy_trainer, self.store = config, inputs, policy_trainer, store
        self.ranks, self.state, self.fingerprint = policy_trainer.ranks, state, fingerprint
        self.interrupt = interrupt
        self.progress = Progress(
            config.steps,
            done=state.step,
            evaluations=lambda step: evaluations_after(step, config) if inputs.held_out is not None else 0,
            enabled=self.ranks.is_main,
        )
        stack.callback(self.progress.close)
        self.phases = Phases(self.progress, watchdog)
        self.journal = Journal(config, self.ranks, self.progress, state.step, evaluated=state.evaluated)
        stack.callback(self.journal.close)
        self.serving = Serving(
            config,
            inputs,
            policy_trainer,
            self.phases,
            on_progress=self.progress.count,
            stop=lambda: self.interrupt.requested,
        )
        stack.callback(self.serving.close)
        rollouts = self.serving.rollouts
        rollouts.check_verifier(inputs.prompts[0])
        self.collector = Collector(config, inputs.prompts, rollouts, policy_trainer.objective, self.ranks)
        self.updater = PolicyUpdater(config, inputs, policy_trainer, state.skipped)
        self.held_out = HeldOut(config, inputs.held_out, rollouts, self.journal, self.ranks)

    def announce(self, start: Start) -> None:
        """Record the resolved configuration and its changes, and print where the run starts."""
        self.journal.write_start(start.branch, self.state.changes)
        first, *more = start.describe(self.config)
        r = self.ranks
        self.progress.message(
            f"{self.config.objective.name} on {self.config.model.path.name}: {self.inputs.prompts.describe()}, "
            f"{r.world} ranks ({r.describe()}), {self.policy_trainer.device.type}; {first}"
        )
        for line in more:
            self.progress.message(line)

    def run(self) -> RunOutcome:
        """Train up to the configured step, then write the model, the curve and the summary."""
        config, state = self.config, self.state
        evaluated: Mapping[str, float] | None = None
        with self._complete_checkpoint():
            if not state.evaluated and (self.held_out or state.measured):
                evaluated = self._evaluate()
                if evaluated is None:
                    return self._stop("before")
                state.baseline = state.baseline or {n: value for n, value in evaluated.items() if n.startswith("eval/")}
                self.journal.report(state.step, {**state.measured, **evaluated})
            while state.step < config.steps:
                metrics = self._train_step()
                if metrics is None:
                    return self._stop("before")
                self.store.advance()
                due = bool(self.held_out) and self._due(config.eval.every)
                stop = state.step < config.steps and self._stop_requested()
                evaluated = self._evaluate() if due and not stop else None
                state.evaluated = not due or evaluated is not None
                state.measured = {} if state.evaluated else values(metrics)
                if state.evaluated:  # otherwise the continued run reports the step with its evaluation
                    self.journal.report(state.step, {**values(metrics), **(evaluated or {})})
                if stop or not state.evaluated:
                    return self._stop("after")
                if self._due(config.checkpoint.every):
                    self._save()
            if evaluated is None and (evaluated := self._evaluate()) is None:
                return self._stop("before")
        with self.phases("finish"):
            self.store.finish()
            self._finish(evaluated)
        return RunOutcome.FINISHED

    def _due(self, every: int) -> bool:
        return self.state.step == self.config.steps or (every > 0 and self.state.step % every == 0)

    def _stop_requested(self) -> bool:
        """True if any rank was asked to stop; all ranks stop together."""
        return any(self.ranks.gather_all(self.interrupt.requested))

    def _stop(self, where: str) -> RunOutcome:
        """Save a checkpoint of the last complete step and end.

        Args:
            where: "before" if work begun after that step is lost, otherwise "after".
        """
        if self.state.saved != self.state.step:
            self._save()
        self.store.finish()
        lost = ", the work since was discarded" if where == "before" else ""
        self.progress.message(f"stopped after step {self.state.step}{lost}; the same command continues")
        return RunOutcome.INTERRUPTED

    def _train_step(self) -> dict[str, Metric] | None:
        """Run one rollout and the optimizer steps on it.

        Returns:
            The step's metrics; None, with nothing changed, if the run was asked to stop before the first optimizer
            step.
        """
        started, state = time.perf_counter(), self.state
        cursor = Cursor.from_state(state.cursor.state(), self.inputs.prompts.size)
        self.serving.publish(state.step)
        selection: Selection | None = None
        with self.phases("rollout"), suppress(Abandoned):
            selection = self.collector.collect(state.step, cursor, state.prefetched)
        if selection is None or self._stop_requested():
            return None
        groups = self.updater.with_context(selection.kept)
        ahead = self.config.rollout.ahead > 0 and state.step + 1 < self.config.steps
        if ahead:
            self.collector.begin(state.step + 1, cursor)
        self.serving.free_devices()
        with self.phases("prepare"):
            batches = self.updater.prepare(state.step, groups)
        if self._stop_requested():
            self.collector.cancel()
            return None
        with self.phases("update"):
            updates = self.updater.update(state.step, batches)
        described = self.collector.describe(state.step, selection)
        state.skipped, state.cursor = self.updater.skipped, cursor
        state.step += 1
        self.journal.write_prompts(state.step, [scored.group.prompt for scored in groups])
        self.journal.write_rollouts(state.step, selection)
        self.serving.trained(state.step)
        with self.phases("rollout"):  # wait for it: no later checkpoint has the weights of these responses
            state.prefetched = self.collector.finish() if ahead else None
        seconds = time.perf_counter() - started
        state.seconds += seconds
        tokens = sum(len(c.tokens) for scored in selection.generated for c in scored.group.completions)
        return {
            **described,
            **describe_contexts(groups),
            **updates,
            **self.phases.take(),
            "time/step": Metric(seconds),
            "speed/tokens_per_second": Metric(tokens / seconds),
        }

    @contextmanager
    def _complete_checkpoint(self) -> Iterator[None]:
        """Complete the checkpoint being written before an error that all ranks raise ends the run."""
        try:
            yield
        except (NumericsError, VerifierError, WriteError):
            with suppress(SdpgError):
                self.store.finish()
            raise

    def _evaluate(self) -> dict[str, float] | None:
        """Evaluate as `HeldOut.measure`; ``time/eval`` includes publishing."""
        if not self.held_out:
            return {}
        self.serving.publish(self.state.step)
        with self.phases("eval"):
            found = self.held_out.measure(self.state.step)
        if found is None:
            return None
        return {**found, EVAL_SECONDS: sum(metric.value for metric in self.phases.take().values())}

    def _save(self) -> None:
        """Save a checkpoint.

        Before the first optimizer step there is nothing to save: a new call reaches the same state.
        """
        if not self.policy_trainer.has_learned:
            return
        with self.phases("checkpoint"):
            self.store.save(
                self.policy_trainer,
                self.state.saved_state(self.config, self.fingerprint),
                self.state.prefetched_writer(),
            )
        self.state.saved = self.state.step

    def _finish(self, evaluated: Mapping[str, float]) -> None:
        """Export the model, plot the curve, and write the summary last, as it marks a finished run."""
        config = self.config
        if config.checkpoint.export:
            export_weights(config, self.policy_trainer, config.run_dir / EXPORT_FOLDER)

        def conclude() -> None:
            plot_learning_curve(config.run_dir)
            summary = self._summary(evaluated)
            write_summary(config.run_dir, summary)
            self.progress.message(describe_run(config, summary))

        on_main(self.ranks, conclude)

    def _summary(self, evaluated: Mapping[str, float]) -> Summary:
        baseline = self.state.baseline
        return Summary(
            accuracy_before=baseline.get("eval/sampled_accuracy"),
            accuracy_after=evaluated.get("eval/sampled_accuracy"),
            greedy_before=baseline.get("eval/greedy_accuracy"),
            greedy_after=evaluated.get("eval/greedy_accuracy"),
            reward=last_value(self.config.run_dir / METRICS_FILE, "reward/mean"),
            steps=self.state.step,
            seconds=round(self.state.seconds, 1),
        )


def done_message(config: RunConfig) -> str:
    """Message for a run that is finished already."""
    summary = read_summary(config.run_dir)
    assert summary is not None
    done = f"{config.run_dir}: done already. More steps continue it: steps=N. A new run needs another run_dir."
    return f"{done}\n{describe_run(config, summary)}"
