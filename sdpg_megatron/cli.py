"""The command line: ``sdpg-megatron train``, ``eval``, ``plan``, ``compare``, ``convert`` and ``inspect``.

The first two run alone or under torchrun.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdpg_megatron import __version__
from sdpg_megatron.config import RunConfig
from sdpg_megatron.config.load import dump, load_config
from sdpg_megatron.errors import ConfigError, OutputError, SdpgError
from sdpg_megatron.process import streams
from sdpg_megatron.process.rank_environment import RankEnvironment
from sdpg_megatron.process.signals import INTERRUPTED, STOPPED, interruptible

if TYPE_CHECKING:
    from sdpg_megatron.checkpoint.branch import BranchRequest

EXPECTED_WARNINGS = (
    ".*Apex (is|are) not installed",
    "full scope is deprecated",
    "When using async grad allreduce",
    "The .grad attribute of a Tensor that is not a leaf",
    "`torch.distributed.*` is deprecated",
    "`load_state_dict` is deprecated",
    "Please use DTensor instead",
)
"""What megatron-core says on any machine without Transformer Engine, and what torch says about megatron-core."""
VERIFY_TEXT = "The largest planet of the solar system is Jupiter. 17 + 25 = 42."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 done, 2 an error that is explained, 75 stopped with its state saved, 130 stopped at once by
        Ctrl-C, 141 where the reader of standard output has ended. A training run that hangs ends with 70, see
        `sdpg_megatron.runtime.watchdog`.
    """
    with streams.guarded():
        try:
            try:
                return _run(arguments)
            finally:
                sys.stdout.flush()
        except SdpgError as error:
            if isinstance(error, OutputError) and error.reader_ended:
                return 128 + signal.SIGPIPE
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            return 2
        except KeyboardInterrupt:
            sys.stderr.write("stopped\n")
            return INTERRUPTED


def _run(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    options, more = parser.parse_known_args(arguments)  # argparse leaves what follows an option in the middle
    if unknown := [argument for argument in more if argument.startswith("-")]:
        parser.error(f"unknown option {unknown[0]}")
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    command: Callable[[argparse.Namespace, Sequence[str]], int] = options.command
    return command(options, [*options.overrides, *more])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdpg-megatron", description="Self-Distilled Policy Gradient on Megatron-core."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="run, or continue, a training run",
        description="Run, or continue, the run that CONFIG describes. Exit code 75: stopped by a signal and saved; the "
        "same command continues. Several ranks: torchrun --nproc-per-node N -m "
        "sdpg_megatron train CONFIG ...",
    )
    train.add_argument("config", type=Path, metavar="CONFIG", help="YAML file; see examples/")
    _add_configuration(train, "e.g. objective.beta=0.01 parallel.tensor=2")
    train.add_argument(
        "--ranks", type=int, metavar="N", help="that --dry-run checks for (default: $WORLD_SIZE, or the fewest)"
    )
    train.add_argument(
        "--branch-from",
        metavar="RUN[@STEP]",
        help="start run_dir from a checkpoint of another run (default: its newest), with its optimizer and reference",
    )
    train.add_argument(
        "--new-reference", action="store_true", help="of a branch: the reference is the model at model.path instead"
    )
    train.set_defaults(command=_train)
    evaluate = commands.add_parser(
        "eval",
        help="evaluate a model on held-out problems",
        description="Evaluate TARGET on data.eval, as its eval section says; the same command continues. Several ranks "
        "share the problems: torchrun --nproc-per-node N -m sdpg_megatron eval TARGET ...",
    )
    what = (
        "a run's folder, for what it has trained; a YAML file, for what its run starts from; or a Hugging Face folder"
    )
    evaluate.add_argument("target", type=Path, metavar="TARGET", help=what)
    evaluate.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the results go")
    evaluate.add_argument("--step", type=int, metavar="N", help="of the run's training (default: its newest)")
    _add_configuration(evaluate, "e.g. data.eval=[aime24.jsonl] eval.samples=32")
    evaluate.set_defaults(command=_evaluate)
    _add_plan(commands.add_parser("plan", help="say what a run needs: memory, communication, time"))
    compare = commands.add_parser(
        "compare",
        help="show evaluations side by side",
        description="Show evaluations side by side: below the numbers of each its difference from the first, over "
        "pairs of results on the same problem.",
    )
    compare.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of an evaluation: what --out named")
    compare.add_argument("--anyway", action="store_true", help="also where data or settings differ")
    compare.set_defaults(command=_compare, overrides=[])
    _add_convert(commands.add_parser("convert", help="bring a model from Hugging Face to Megatron, or back"))
    inspect = commands.add_parser(
        "inspect",
        help="say what a folder holds",
        description="Say what a Hugging Face folder, a run, one of its checkpoints or a Megatron checkpoint holds, and "
        "what of it is damaged. Exit code 2 where anything is.",
    )
    inspect.add_argument("path", type=Path, metavar="PATH")
    inspect.add_argument("--json", action="store_true", help="for programs")
    inspect.add_argument("--digests", action="store_true", help="read a run checkpoint's files, and compare digests")
    inspect.set_defaults(command=_inspect, overrides=[])
    return parser


def _add_convert(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Make a Megatron checkpoint of a Hugging Face folder, or a Hugging Face folder of a Megatron checkpoint or of "
        "a run of this trainer. The result is read back and compared before it is put in place."
    )
    command.add_argument("source", type=Path, metavar="SOURCE", help="folder, run, or checkpoint")
    command.add_argument("target", type=Path, metavar="TARGET", help="a new path")
    command.add_argument("--to", choices=("megatron", "huggingface"), help="refuse a SOURCE of this kind")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: as they are)")
    command.add_argument(
        "--like", type=Path, metavar="FOLDER", help="Hugging Face folder with the model's config.json and tokenizer"
    )
    command.add_argument("--shard-gb", type=float, default=5.0, metavar="N", help="bound of one safetensors file")
    command.add_argument(
        "--verify",
        nargs="?",
        const=VERIFY_TEXT,
        metavar="TEXT",
        help="have both models read a text, print the largest difference of logits; needs memory for a whole model",
    )
    command.set_defaults(command=_convert, overrides=[])


def _add_plan(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Say what the run that CONFIG describes needs of every GPU, and about how long a step takes; without a GPU, "
        "from CONFIG and the model's config.json alone. Exit code 2 where it does not fit."
    )
    command.add_argument("config", type=Path, metavar="CONFIG", help="YAML file; see examples/")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. parallel.tensor=2")
    command.add_argument("--gpu", default="H100", metavar="NAME", help="of the GPUs (default: %(default)s)")
    command.add_argument("--ranks", type=int, metavar="N", help="of the trainer (default: the fewest of the layout)")
    command.add_argument("--json", action="store_true", help="for programs")
    command.set_defaults(command=_plan)


def _add_configuration(command: argparse.ArgumentParser, example: str) -> None:
    command.add_argument("overrides", nargs="*", metavar="key=value", help=example)
    command.add_argument(
        "--dry-run", action="store_true", help="check everything, write nothing, print the configuration"
    )


def _train(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    environment = RankEnvironment.read()
    config = load_config(options.config, overrides)
    from sdpg_megatron.runtime.run_lock import end_with_launcher

    end_with_launcher()
    branch_from = _branch_request(options)
    if options.dry_run:
        return _dry_run(config, branch_from, options.ranks, environment)
    if options.ranks is not None:
        raise ConfigError("--ranks", options.ranks, "none without --dry-run", "the launcher says how many ranks start")
    streams.keep_going()
    from sdpg_megatron.train.loop import RunOutcome, done_message, train

    outcome = train(config, branch_from)
    if outcome is RunOutcome.ALREADY_DONE and environment.is_main:
        sys.stdout.write(done_message(config) + "\n")
    return STOPPED if outcome is RunOutcome.INTERRUPTED else 0


def _branch_request(options: argparse.Namespace) -> BranchRequest | None:
    if options.branch_from is None:
        if options.new_reference:
            raise ConfigError("--new-reference", True, "--branch-from beside it", "add --branch-from RUN[@STEP]")
        return None
    from sdpg_megatron.checkpoint.branch import BranchRequest

    return BranchRequest.parse(options.branch_from, new_reference=options.new_reference)


def _dry_run(
    config: RunConfig, branch_from: BranchRequest | None, ranks: int | None, environment: RankEnvironment
) -> int:
    from sdpg_megatron.estimate.shards import Grid
    from sdpg_megatron.train.dry_run import check_run
    from sdpg_megatron.train.inputs import load_inputs

    if ranks is None and "WORLD_SIZE" in os.environ:
        ranks = environment.world_size
    world = Grid.of(config.parallel, ranks).world
    _show_checks(config, check_run(config, load_inputs(config), branch_from, world, environment), environment)
    return 0


def _show_checks(config: RunConfig, lines: Iterable[str], environment: RankEnvironment) -> None:
    """Print the lines of checks as they pass to standard error, then the configuration to standard output."""
    for line in lines:
        if environment.is_main:
            sys.stderr.write(f"{line}\n")
    if environment.is_main:
        sys.stdout.write(dump(config))


def _evaluate(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from sdpg_megatron.evaluation.table import scores_table, show
    from sdpg_megatron.train.eval_command import evaluate_target, load_prompts
    from sdpg_megatron.train.eval_target import find_eval_target
    from sdpg_megatron.train.inputs import load_model_inputs

    environment = RankEnvironment.read()
    eval_target = find_eval_target(options.target, options.step, overrides)
    inputs = load_model_inputs(eval_target.config)
    files = load_prompts(eval_target.config, inputs)
    if options.dry_run:
        from sdpg_megatron.train.dry_run import check_evaluation

        _show_checks(
            eval_target.config, check_evaluation(eval_target, inputs, files, options.out, environment), environment
        )
        return 0
    with interruptible():
        scores = evaluate_target(eval_target, inputs, files, options.out)
    if scores is not None:
        show(eval_target.name, scores_table(scores), sys.stdout)
        sys.stdout.write(f"{options.out}: each problem with its responses, *.jsonl; all numbers, summary.json\n")
    return 0


def _compare(options: argparse.Namespace, more: Sequence[str]) -> int:
    from sdpg_megatron.evaluation.compare import compare
    from sdpg_megatron.evaluation.results import Evaluation
    from sdpg_megatron.evaluation.table import show

    folders = [*options.folders, *map(Path, more)]
    for name, table in compare([Evaluation.read(folder) for folder in folders], anyway=options.anyway).items():
        show(name, table, sys.stdout)
    return 0


def _convert(options: argparse.Namespace, more: Sequence[str]) -> int:
    from sdpg_megatron.convert.command import convert

    _refuse(more)
    with interruptible():
        convert(
            options.source,
            options.target,
            to=options.to,
            like=options.like,
            dtype=options.dtype,
            shard_bytes=_bytes_of(options.shard_gb),
            text=options.verify,
        )
    return 0


def _bytes_of(gigabytes: float) -> int:
    if not 1 <= gigabytes * 10**9 < math.inf:  # also of what is no number
        raise ConfigError("--shard-gb", gigabytes, "a positive number of gigabytes", "choose another, such as 5")
    return int(gigabytes * 10**9)


def _plan(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    config = load_config(options.config, overrides)
    from sdpg_megatron.estimate.advice import advise
    from sdpg_megatron.estimate.gpus import find_gpu
    from sdpg_megatron.estimate.plan import make_plan
    from sdpg_megatron.estimate.report import as_json, as_text

    plan = make_plan(config, find_gpu(options.gpu), options.ranks)
    advice = advise(plan)
    sys.stdout.write(as_json(plan, advice) if options.json else as_text(plan, advice))
    return 0 if plan.fits else 2


def _inspect(options: argparse.Namespace, more: Sequence[str]) -> int:
    from sdpg_megatron.convert.inspect import inspect

    _refuse(more)
    report = inspect(options.path, digests=options.digests)
    sys.stdout.write(report.to_json() if options.json else report.to_text())
    return 2 if report.damage else 0


def _refuse(more: Sequence[str]) -> None:
    if more:
        raise ConfigError("command line", more[0], "no more arguments", "remove it")


if __name__ == "__main__":
    sys.exit(main())
