"""Megatron-LM's arguments and the SDPG configuration of one program."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sdpg_megatron.architecture import Architecture
from sdpg_megatron.config import RunConfig
from sdpg_megatron.config.field_values import typed
from sdpg_megatron.config.load import apply_override, flatten, parse, read_tree
from sdpg_megatron.convert.arguments import conflicts
from sdpg_megatron.errors import ConfigError

logger = logging.getLogger(__name__)

DECIDED: Mapping[str, str] = {
    "parallel.tensor": "tensor_model_parallel_size",
    "parallel.pipeline": "pipeline_model_parallel_size",
    "parallel.virtual_pipeline": "virtual_pipeline_model_parallel_size",
    "parallel.sequence": "sequence_parallel",
    "parallel.context": "context_parallel_size",
    "optimizer.micro_batch_size": "micro_batch_size",
}
"""Fields that arguments of Megatron-LM decide."""
DECIDED_FOR_EXPERTS: Mapping[str, str] = {
    "parallel.expert": "expert_model_parallel_size",
    "parallel.expert_tensor": "expert_tensor_parallel_size",
}
"""The same for a mixture of experts only."""
SAME: Mapping[str, str] = {
    "optimizer.lr": "lr",
    "optimizer.min_lr": "min_lr",
    "optimizer.warmup_steps": "lr_warmup_iters",
    "optimizer.schedule": "lr_decay_style",
    "optimizer.beta1": "adam_beta1",
    "optimizer.beta2": "adam_beta2",
    "optimizer.eps": "adam_eps",
    "optimizer.weight_decay": "weight_decay",
    "optimizer.clip_grad": "clip_grad",
    "optimizer.distributed": "use_distributed_optimizer",
    "optimizer.overlap_grad_reduce": "overlap_grad_reduce",
    "optimizer.overlap_param_gather": "overlap_param_gather",
}
"""Fields without an effect here, which must not contradict an argument."""
UNUSED = (
    *("eval", "checkpoint", "rollout_log", "writers", "alarms", "data.eval"),
    *("model.spec", "model.recompute", "model.gradient_accumulation_fusion", "model.activation_fusion"),
    *("parallel.dispatcher", "parallel.timeout", "parallel.rendezvous_timeout"),
    *("optimizer.skip_limit", "optimizer.bucket_size"),
)
"""Sections and fields without an effect here, except those of `USED`."""
USED = ("alarms.gradient_every",)
"""Fields with an effect, of sections in `UNUSED`."""


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this package's arguments to Megatron-LM's parser (`extra_args_provider`)."""
    group = parser.add_argument_group("SDPG")
    group.add_argument("--sdpg", type=Path, required=True, metavar="YAML", help="configuration of the method")
    group.add_argument("--sdpg-set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of single fields")
    return parser


def run_config(args: Any) -> RunConfig:
    """Configuration of the run: the YAML file, with the layout and the number of steps from Megatron-LM's arguments.

    Raises:
        ConfigError: the file is invalid or contradicts an argument, or an argument is not supported.
    """
    tree = read_tree(args.sdpg, args.sdpg_set)
    given = flatten(typed(tree, RunConfig))
    faults = [*_unsupported(args), *_contradictions(given, args)]
    if faults:
        raise ConfigError.joined(faults)
    decided = {field: getattr(args, argument) for field, argument in _decided(args).items()}
    decided |= {
        "optimizer.warmup_steps": 0,  # Megatron-LM has its own; the default may exceed a short run
        "model.dtype": _dtype(args),
        "model.spec": "local" if args.transformer_impl == "local" else "te",
        "steps": args.train_iters // _minibatches(given),
    }
    for field, value in decided.items():
        apply_override(tree, f"{field}={json.dumps(value)}")
    config = parse(tree)
    if config.rollout.engine == "sglang" and config.rollout.sglang.colocated:
        fix = "give the servers separate GPUs (rollout.sglang.colocated: false)"
        raise ConfigError("rollout.sglang.colocated", True, "false: Megatron-LM keeps its memory", fix)
    if config.objective.teacher in ("ema", "every"):
        fix = "use current, rollout or initial, or train with sdpg-megatron"
        expected = "a teacher without separate weights, which Megatron-LM's checkpoints do not have"
        raise ConfigError("objective.teacher", config.objective.teacher, expected, fix)
    return config


def warn_of_unused(args: Any) -> None:
    """Log the fields of the YAML file that have no effect."""
    given = flatten(read_tree(args.sdpg, args.sdpg_set))
    unused = [
        field
        for field in given
        if field not in USED and any(field == name or field.startswith(f"{name}.") for name in UNUSED)
    ]
    if unused:
        logger.warning("%s: no effect inside Megatron-LM: %s", args.sdpg, ", ".join(unused))


def check_model_arguments(args: Any, arch: Architecture, folder: Path) -> None:
    """Compare the model of Megatron-LM's arguments with the model in `folder`.

    Raises:
        ConfigError: names each argument that contradicts config.json.
    """

    def error(argument: str, found: Any, expected: Any, key: str | None) -> ConfigError:
        source = f"as in {folder / 'config.json'} ({key})" if key else f"as in every model of the family {arch.family}"
        fix = f"correct it: python tools/megatron_lm_arguments.py {folder} prints all of them"
        return ConfigError(_flag(argument), found, f"{expected!r}, {source}", fix)

    # Megatron-LM's vocabulary argument is that of its tokenizer.
    found = {name: value for name, value in vars(args).items() if name != "vocab_size"}
    faults = [error(c.argument, c.found, c.expected, c.key) for c in conflicts(found, arch)]
    if args.padded_vocab_size < arch.vocab_size:
        expected = f"at least {arch.vocab_size}, as in {folder / 'config.json'} (vocab_size)"
        fix = f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder}"
        faults.append(ConfigError("padded_vocab_size", args.padded_vocab_size, expected, fix))
    if faults:
        raise ConfigError.joined(faults)


def model_flags(arch: Architecture, folder: Path) -> list[str]:
    """Megatron-LM's arguments for the model in a Hugging Face folder, as on a command line."""
    experts = arch.experts
    flags: dict[str, object] = {
        "--num-layers": arch.num_layers,
        "--hidden-size": arch.hidden_size,
        "--ffn-hidden-size": arch.ffn_size,
        "--num-attention-heads": arch.num_heads,
        "--group-query-attention": None,
        "--num-query-groups": arch.num_kv_heads,
        "--kv-channels": arch.head_dim,
        "--max-position-embeddings": arch.max_positions,
        "--seq-length": arch.max_positions,
        "--position-embedding-type": "rope",
        "--rotary-base": int(arch.rope_theta),
        "--normalization": "RMSNorm",
        "--norm-epsilon": arch.rms_eps,
        "--swiglu": None,
        "--disable-bias-linear": None,
        "--attention-dropout": 0,
        "--hidden-dropout": 0,
        "--tokenizer-type": "HuggingFaceTokenizer",
        "--tokenizer-model": folder,
    }
    if arch.rope_scaling is not None:
        flags |= {"--use-rope-scaling": None, "--rope-scaling-factor": arch.rope_scaling}
    if experts is not None:
        flags |= {"--num-experts": experts.count, "--moe-router-topk": experts.per_token}
        flags |= {"--moe-ffn-hidden-size": arch.ffn_size, "--moe-router-load-balancing-type": "none"}
    switches = {
        "--untie-embeddings-and-output-weights": not arch.tied_embeddings,
        "--add-qkv-bias": arch.qkv_bias,
        "--qk-layernorm": arch.qk_norm,
        "--moe-router-pre-softmax": experts is not None and not experts.normalized,
    }
    flags |= {name: None for name, present in switches.items() if present}
    return [str(part) for name, value in flags.items() for part in ((name,) if value is None else (name, value))]


def _decided(args: Any) -> Mapping[str, str]:
    return {**DECIDED, **DECIDED_FOR_EXPERTS} if args.num_experts else DECIDED


def _unsupported(args: Any) -> Iterator[ConfigError]:
    if args.dataloader_type != "external":
        yield ConfigError("--dataloader-type", args.dataloader_type, "external", "add --dataloader-type external")
    if not args.calculate_per_token_loss:
        fix = "add --calculate-per-token-loss"
        yield ConfigError("--calculate-per-token-loss", False, "the argument: losses are sums over tokens", fix)
    if args.fp16:
        yield ConfigError("--fp16", True, "float32 or --bf16", "replace it by --bf16")
    if args.rampup_batch_size:
        yield ConfigError("--rampup-batch-size", args.rampup_batch_size, "no ramp-up of the batch", "remove it")
    if not args.train_iters:
        yield ConfigError("--train-iters", args.train_iters, "the number of optimizer steps", "set it")
    if getattr(args, "mtp_num_layers", None):
        yield ConfigError("--mtp-num-layers", args.mtp_num_layers, "no multi-token prediction", "remove it")
    if args.num_experts and args.pipeline_model_parallel_size > 1 and args.moe_token_dispatcher_type == "allgather":
        expected = "alltoall or flex with pipeline stages: micro-batches differ in length"
        yield ConfigError("--moe-token-dispatcher-type", "allgather", expected, "use alltoall")
    for name in ("attention_dropout", "hidden_dropout"):
        if getattr(args, name):
            yield ConfigError(_flag(name), getattr(args, name), "0", f"add {_flag(name)} 0")


def _contradictions(given: Mapping[str, Any], args: Any) -> Iterator[ConfigError]:
    """Fields of the YAML file that differ from the arguments that decide them."""
    for field, argument in {**_decided(args), **SAME}.items():
        if field in given and given[field] != getattr(args, argument):
            expected = f"{getattr(args, argument)!r}, as in Megatron-LM's arguments"
            yield ConfigError(field, given[field], expected, f"remove it: {_flag(argument)} decides")
    if "model.dtype" in given and given["model.dtype"] != _dtype(args):
        yield ConfigError("model.dtype", given["model.dtype"], f"{_dtype(args)}", "remove it: --bf16 decides")
    minibatches = _minibatches(given)
    if args.train_iters and args.train_iters % minibatches:
        expected = f"a multiple of optimizer.minibatches ({minibatches})"
        yield ConfigError("--train-iters", args.train_iters, expected, "an iteration trains on one mini-batch")
    if "steps" in given and args.train_iters and given["steps"] != args.train_iters // minibatches:
        expected = f"{args.train_iters // minibatches}, as in Megatron-LM's arguments"
        yield ConfigError("steps", given["steps"], expected, "remove it: --train-iters decides")


def _minibatches(given: Mapping[str, Any]) -> int:
    found = given.get("optimizer.minibatches", 1)
    return found if isinstance(found, int) and found > 0 else 1  # other values are refused with the configuration


def _dtype(args: Any) -> str:
    return "bfloat16" if args.params_dtype is torch.bfloat16 else "float32"


def _flag(argument: str) -> str:
    return f"--{argument.replace('_', '-')}"
