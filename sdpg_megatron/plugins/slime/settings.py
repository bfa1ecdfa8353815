"""slime's arguments and the SDPG configuration of one run.

slime reads the YAML file of ``--custom-config-path`` into its arguments. Its key `sdpg` has the sections `objective`
and `head` of this package's configuration, and the keys `columns` and `teacher_prompt`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sdpg_megatron.config import RunConfig
from sdpg_megatron.config.load import parse
from sdpg_megatron.errors import ConfigError, did_you_mean

PATHS: Mapping[str, str] = {
    "custom_convert_samples_to_train_data_path": "sdpg_megatron.plugins.slime.samples.convert",
    "rollout_data_postprocess_path": "sdpg_megatron.plugins.slime.hooks.postprocess",
    "custom_megatron_before_train_step_hook_path": "sdpg_megatron.plugins.slime.hooks.before_train_step",
    "custom_megatron_before_log_prob_hook_path": "sdpg_megatron.plugins.slime.hooks.before_log_prob",
    "custom_loss_function_path": "sdpg_megatron.plugins.slime.hooks.loss",
}
"""Arguments of slime that must be set, to these functions or to functions that call them."""

REFUSED: Mapping[str, tuple[Any, str]] = {
    "loss_type": ("custom_loss", "add --loss-type custom_loss"),
    "compute_advantages_and_returns": (True, "remove --disable-compute-advantages-and-returns: the gates need them"),
    "enable_mtp_training": (False, "remove it: the head computes the loss from the model's last hidden states"),
    "mtp_num_layers": (None, "remove it: the model would return the states of several layers"),
    "allgather_cp": (False, "remove it: this package has the zigzag layout of context parallelism only"),
    "recompute_loss_function": (False, "remove it: the head computes logits by parts and keeps none"),
    "overlap_moe_expert_parallel_comm": (False, "remove it: its schedule does not call the model's output layer"),
    "rollout_top_p": (1.0, "remove it: the loss and the teacher use the whole distribution"),
    "entropy_coef": (0.0, "set sdpg.objective.entropy_coefficient instead"),
    "kl_loss_coef": (0.0, "set sdpg.objective.alpha instead"),
    "use_tis": (False, "set sdpg.objective.correction instead"),
    "use_opsm": (False, "remove it: only slime's policy loss has it"),
    "use_opd": (False, "remove it: the teacher here is the policy itself with a privileged prompt"),
    "custom_pg_loss_reducer_function_path": (None, "remove it: only slime's policy loss calls it"),
}
"""Arguments of slime that this package does not support or would ignore: the accepted value, and the fix for others."""

ESTIMATORS = ("gspo", "cispo")
"""Advantage estimators with the advantages of GRPO and a policy loss of their own, which is not computed here."""

HOST_DECIDES: Mapping[str, str] = {
    "aggregation": "--calculate-per-token-loss decides: the mean over tokens, or without it over rollouts",
    "advantage_deviation": "slime computes the advantages (--disable-grpo-std-normalization)",
    "teacher_every": "slime keeps no copy of past weights",
    "teacher_ema": "slime keeps no copy of past weights",
    "peer_reward": "the samples have the teacher's prompts",
    "strip_peer_thinking": "the samples have the teacher's prompts",
}
"""Fields of `objective` without an effect here."""

KEYS = ("objective", "head", "columns", "teacher_prompt")
UNKNOWN_STEPS = 1_000_000_000
"""Number of rollouts while slime does not know it: in the rollout manager with --num-epoch."""


@dataclass(frozen=True, slots=True)
class SlimeSettings:
    """Configuration of SDPG in one slime run."""

    config: RunConfig
    """Only the sections `objective` and `head` and the field `rollout.temperature` apply."""
    columns: Literal["padded", "valid"]
    """Vocabulary columns that count. `padded`: all columns of the output matrix, as in slime's log-probs. `valid`:
    without Megatron's padding."""
    teacher_prompt: str | None
    """Function ``module:name`` with the signature ``(args, sample)`` that returns a sample's teacher prompt; None: the
    prompt is in the sample's metadata."""

    @property
    def minibatches(self) -> int:
        """Optimizer steps per rollout."""
        return self.config.optimizer.minibatches

    def vocab_size(self, args: Any) -> int:
        """Number of vocabulary columns that count."""
        return int(args.padded_vocab_size if self.columns == "padded" else args.vocab_size)


def read_settings(args: Any) -> SlimeSettings:
    """Read the configuration from slime's arguments.

    Raises:
        ConfigError: an invalid configuration, or an argument of slime that is missing or not supported. Shows all
            findings of a pass.
    """
    given = getattr(args, "sdpg", None) or {}
    if not isinstance(given, Mapping):
        raise ConfigError("sdpg", given, f"a mapping with the keys {', '.join(KEYS)}", "indent them below sdpg:")
    faults = [*_unsupported(args), *_invalid(given)]
    if faults:
        raise ConfigError.joined(faults)
    config = _config(args, given)
    faults = [*_inapplicable(config, args)]
    if faults:
        raise ConfigError.joined(faults)
    return SlimeSettings(config, given.get("columns", "padded"), given.get("teacher_prompt"))


def _config(args: Any, given: Mapping[str, Any]) -> RunConfig:
    """Configuration with the fields that slime's arguments decide."""
    minibatches = max(1, args.rollout_batch_size * args.n_samples_per_prompt // args.global_batch_size)
    return parse(
        {
            "run_dir": Path("unused"),
            "steps": args.num_rollout or UNKNOWN_STEPS,
            "model": {"path": Path(args.hf_checkpoint)},
            "data": {"train": []},
            "rollout": {"temperature": args.rollout_temperature, "prompts_per_step": minibatches},
            "optimizer": {"minibatches": minibatches, "warmup_steps": 0},
            "objective": given.get("objective"),
            "head": given.get("head"),
        }
    )


def _unsupported(args: Any) -> Iterator[ConfigError]:
    for argument, path in PATHS.items():
        if not getattr(args, argument, None):
            expected = f"{path}, or a function that calls it"
            yield ConfigError(flag(argument), None, expected, f"add {flag(argument)} {path}")
    for argument, (accepted, fix) in REFUSED.items():
        found = getattr(args, argument, accepted)
        if (found or None) != (accepted or None):
            yield ConfigError(flag(argument), found, repr(accepted), fix)
    if args.advantage_estimator in ESTIMATORS:
        fix = "use grpo, which has the same advantages, and set sdpg.objective.name for another policy loss"
        yield ConfigError("--advantage-estimator", args.advantage_estimator, "another estimator", fix)


def _invalid(given: Mapping[str, Any]) -> Iterator[ConfigError]:
    for key in given:
        if key not in KEYS:
            fix = did_you_mean(str(key), KEYS) or f"known here: {', '.join(KEYS)}"
            yield ConfigError(f"sdpg.{key}", key, "a known key", fix)
    columns = given.get("columns", "padded")
    if columns not in ("padded", "valid"):
        yield ConfigError("sdpg.columns", columns, "'padded' or 'valid'", "choose one of these")
    if not isinstance(given.get("teacher_prompt", ""), str):
        yield ConfigError("sdpg.teacher_prompt", given["teacher_prompt"], "module:function", "write it as text")
    objective = given.get("objective")
    for field, reason in HOST_DECIDES.items():
        if isinstance(objective, Mapping) and field in objective:
            expected = f"no such field in slime: {reason}"
            yield ConfigError(f"sdpg.objective.{field}", objective[field], expected, "remove it")


def _inapplicable(config: RunConfig, args: Any) -> Iterator[ConfigError]:
    objective = config.objective
    if objective.teacher not in ("current", "rollout"):
        expected = "current or rollout: slime keeps no weights for another teacher"
        yield ConfigError("sdpg.objective.teacher", objective.teacher, expected, "use one of these")
    if objective.context != "data":
        fix = "set it to data, and put the successful response into the teacher's prompt of each sample"
        yield ConfigError("sdpg.objective.context", objective.context, "data", fix)
    if objective.alpha and not (getattr(args, "use_kl_loss", False) or getattr(args, "kl_coef", 0)):
        fix = "add --use-kl-loss --ref-load <checkpoint>, or set it to 0"
        expected = "0 without a reference model in slime"
        yield ConfigError("sdpg.objective.alpha", objective.alpha, expected, fix)
    if objective.correction != "none" and getattr(args, "use_rollout_logprobs", False):
        expected = "none with --use-rollout-logprobs, which takes the rollout's log-probs as the trainer's"
        yield ConfigError("sdpg.objective.correction", objective.correction, expected, "remove one of the two")


def flag(argument: str) -> str:
    """Command-line form of an argument."""
    return f"--{argument.replace('_', '-')}"
