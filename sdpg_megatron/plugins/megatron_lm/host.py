"""Callbacks of Megatron-LM's `pretrain()`: model, data and forward step; and the passes before each training pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from sdpg_megatron.batching.step_batch import StepBatch
from sdpg_megatron.config import RunConfig
from sdpg_megatron.errors import CheckpointError, ConfigError
from sdpg_megatron.mcore import layers, parallel
from sdpg_megatron.mcore.forward_step import ForwardStep, Report, read_reports
from sdpg_megatron.mcore.frozen_weights import FrozenWeights
from sdpg_megatron.mcore.model import load_weights, mark_sharded
from sdpg_megatron.mcore.policy import Policy, needs_initial
from sdpg_megatron.mcore.routing import deliver_numbers
from sdpg_megatron.objectives import Objective, build_objective
from sdpg_megatron.observe.metrics import Metric, merge
from sdpg_megatron.plugins.megatron_lm.arguments import check_model_arguments, run_config, warn_of_unused
from sdpg_megatron.plugins.megatron_lm.steps import HostSteps
from sdpg_megatron.plugins.report import pairs
from sdpg_megatron.records import MicroBatch
from sdpg_megatron.train.inputs import Inputs, load_inputs, load_run_model


class MegatronHost:
    """SDPG in one process of Megatron-LM's `pretrain()`. Every rank has one."""

    def __init__(self, get_args: Callable[[], Any], transformer_config: Callable[[Any], Any], stack: ExitStack) -> None:
        """
        Args:
            get_args: Megatron-LM's `get_args`.
            transformer_config: its `core_transformer_config_from_args`.
            stack: closes what this host opens.
        """
        self._get_args, self._transformer_config, self._stack = get_args, transformer_config, stack
        self._built: list[GPTModel] = []
        self._initial: FrozenWeights | None = None
        self._policy: Policy | None = None
        self._steps: HostSteps | None = None
        self._minibatches: tuple[int, list[StepBatch], dict[str, Metric]] = (-1, [], {})
        self._forward_step: ForwardStep | None = None

    # --- what `pretrain()` calls

    def model_provider(self, pre_process: bool = True, post_process: bool = True, **options: Any) -> GPTModel:
        """Build a chunk of Megatron-LM's model with the weights of `model.path`; a checkpoint of --load replaces them.

        Args:
            options: `vp_stage`; others, which newer versions pass, repeat Megatron's global state.
        """
        args, config = self._get_args(), self.config
        arch, ranks = self.inputs.arch, parallel.current()  # collective, as building a chunk is
        network = options.get("config") or self._transformer_config(args)
        # Megatron-LM turns it off for its own data. Here each micro-batch has its own length.
        network.variable_seq_lengths = network.pipeline_model_parallel_size > 1
        if network.num_moe_experts is None:  # megatron-core reads it for dense models too
            network.moe_token_dispatcher_type = "alltoall"
        stage = options.get("vp_stage")
        local = args.transformer_impl == "local"
        chunk = GPTModel(
            network,
            layers.local_block_spec(network, stage) if local else layers.te_layer_spec(network),
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
            parallel_output=True,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type=args.position_embedding_type,
            rotary_percent=args.rotary_percent,
            rotary_base=args.rotary_base,
            rope_scaling=args.use_rope_scaling,
            rope_scaling_factor=getattr(args, "rope_scaling_factor", 1.0) or 1.0,
            vp_stage=stage,
        )
        deliver_numbers(chunk)
        mark_sharded([chunk], arch)
        load_weights([chunk], config.model.path, arch, ranks)
        self._built.append(chunk)
        chunks = config.parallel.virtual_pipeline or 1
        if len(self._built) == chunks and needs_initial(config, self.objective):
            self._initial = FrozenWeights(self._built)
        return chunk

    def data_provider(self, _samples: Any, vp_stage: int | None = None) -> tuple[Iterator[int], None, None]:
        """Iterator of micro-batch numbers. `pretrain()` evaluates nothing: that needs generation."""
        args = self._get_args()
        args.eval_iters = 0
        first = args.iteration * self._num_microbatches(args)

        def numbers() -> Iterator[int]:
            number = first
            while True:
                yield number
                number += 1

        return numbers(), None, None

    data_provider.is_distributed = True  # type: ignore[attr-defined]

    def forward_step(self, data: Iterator[MicroBatch], model: nn.Module) -> tuple[Tensor, Any]:
        """Forward step of the current training pass."""
        assert self._forward_step is not None, "the schedule is wrapped"
        return self._forward_step(data, model)

    # --- what the wrapped schedule calls

    @contextmanager
    def prepare(self, chunks: list[nn.Module], numbers: list[int]) -> Iterator[Sequence[MicroBatch]]:
        """Collect rollouts if a step begins, run the passes before the training pass, and yield its micro-batches."""
        iteration = numbers[0] // len(numbers)
        if self._policy is None or self._steps is None:
            self._policy, self._steps = self._start(chunks, iteration)
        policy, steps, minibatches = self._policy, self._steps, self.config.optimizer.minibatches
        step, number = divmod(iteration, minibatches)
        if self._minibatches[0] != step:  # otherwise a further mini-batch, or a repetition of the last pass
            self._minibatches = (step, *steps.run(step))
        batch = self._minibatches[1][number]
        context = steps.preparer.context(step, number, batch)
        self._forward_step = policy.forward_step(context)
        ready = policy.with_late_teacher(batch.micro_batches, context)
        with policy.routing.step(self._filled(ready, len(numbers))) as numbered:
            yield numbered
        policy.updated()

    def report(self, reports: list[Report]) -> list[dict[str, Tensor]]:
        """Metrics of the training pass in Megatron-LM's form: reduced over all ranks, the same in each micro-batch."""
        assert self._policy is not None and self._steps is not None, "after `prepare`"
        policy = self._policy
        local = merge(read_reports(reports)) if policy.ranks.tensor == 0 else {}
        merged = merge(policy.ranks.gather_all({**local, **policy.routing.metrics()}))
        step, _, rollouts = self._minibatches
        self._steps.preparer.check_mismatch(step, merged)
        found = pairs({**merged, **rollouts}, policy.device)
        return [found] * len(reports)

    # --- what they need

    @cached_property
    def config(self) -> RunConfig:
        """Configuration of the run."""
        return run_config(self._get_args())

    @cached_property
    def inputs(self) -> Inputs:
        """Model description, tokenizer and data. Collective over all ranks at first."""
        args, ranks = self._get_args(), parallel.current()
        model = load_run_model(self.config)
        check_model_arguments(args, model.arch, self.config.model.path)
        if ranks.is_main:
            warn_of_unused(args)
        return load_inputs(self.config, model, ranks)

    @cached_property
    def objective(self) -> Objective:
        """Objective of the run."""
        return build_objective(self.config.objective, self.config.total_optimizer_steps)

    def _start(self, chunks: list[nn.Module], iteration: int) -> tuple[Policy, HostSteps]:
        step, begun = divmod(iteration, self.config.optimizer.minibatches)
        if begun:
            raise CheckpointError(
                f"--load: found iteration {iteration}, within a rollout step whose responses are lost, expected a "
                f"multiple of optimizer.minibatches ({self.config.optimizer.minibatches}). Fix: load an earlier "
                "checkpoint, and save only at such iterations (--save-interval)"
            )
        policy = Policy(
            self.config,
            self.inputs.arch,
            self.objective,
            parallel.current(),
            chunks,
            gathers_late=self._get_args().overlap_param_gather,
            initial=self._initial,
        )
        return policy, HostSteps(self.config, self.inputs, policy, step, self._stack)

    def _filled(self, batches: list[MicroBatch], count: int) -> list[MicroBatch]:
        """Add empty micro-batches: their number is fixed by Megatron-LM's batch sizes."""
        if len(batches) > count:
            args = self._get_args()
            raise ConfigError(
                "--global-batch-size",
                args.global_batch_size,
                f"room for {len(batches)} micro-batches on each data-parallel rank ({count} now)",
                "raise it to rollout.prompts_per_step x rollout.group_size / optimizer.minibatches, or raise "
                "--micro-batch-size or optimizer.micro_batch_tokens",
            )
        return [*batches, *[batches[0].emptied()] * (count - len(batches))]

    def _num_microbatches(self, args: Any) -> int:
        return int(args.global_batch_size // (args.micro_batch_size * args.data_parallel_size))
