"""Command line: ``sdpg-megatron train``, ``eval``, ``plan``, ``compare``, ``convert`` and ``inspect``.

``train`` and ``eval`` run alone or under torchrun.
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
"""Warnings of megatron-core without Transformer Engine, and of torch about megatron-core."""
VERIFY_TEXT = "The largest planet of the solar system is Jupiter. 17 + 25 = 42."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 done, 2 an explained error, 75 stopped with its state saved, 130 stopped at once by Ctrl-C, 141
        if the reader of standard output has ended. A training run that hangs ends with 70, see
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
    options, more = parser.parse_known_args(arguments)  # positionals after an option are left over
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
        help="start or continue a training run",
        description="Start or continue the run that CONFIG describes. Exit code 75: stopped by a signal and saved; the "
        "same command continues. Several ranks: torchrun --nproc-per-node N -m "
        "sdpg_megatron train CONFIG ...",
    )
    train.add_argument("config", type=Path, metavar="CONFIG", help="YAML file; see examples/")
    _add_configuration(train, "e.g. objective.beta=0.01 parallel.tensor=2")
    train.add_argument(
        "--ranks", type=int, metavar="N", help="ranks for --dry-run (default: $WORLD_SIZE, or the fewest possible)"
    )
    train.add_argument(
        "--branch-from",
        metavar="RUN[@STEP]",
        help="start run_dir from a checkpoint of another run (default: its newest), with its optimizer and reference",
    )
    train.add_argument(
        "--new-reference", action="store_true", help="with --branch-from: use model.path as the reference instead"
    )
    train.set_defaults(command=_train)
    evaluate = commands.add_parser(
        "eval",
        help="evaluate a model on held-out problems",
        description="Evaluate TARGET on data.eval with the settings of eval; the same command continues. Several ranks "
        "share the problems: torchrun --nproc-per-node N -m sdpg_megatron eval TARGET ...",
    )
    target_help = "run folder (trained model), YAML file (the model its run starts from), or Hugging Face folder"
    evaluate.add_argument("target", type=Path, metavar="TARGET", help=target_help)
    evaluate.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder for the results")
    evaluate.add_argument("--step", type=int, metavar="N", help="training step of the run (default: its newest)")
    _add_configuration(evaluate, "e.g. data.eval=[aime24.jsonl] eval.samples=32")
    evaluate.set_defaults(command=_evaluate)
    _add_plan(commands.add_parser("plan", help="estimate a run's memory, communication and time"))
    compare = commands.add_parser(
        "compare",
        help="show evaluations side by side",
        description="Show evaluations side by side. Below each score is its difference from the first evaluation, over "
        "pairs of results on the same problem.",
    )
    compare.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="--out folder of an evaluation")
    compare.add_argument("--anyway", action="store_true", help="compare even if data or settings differ")
    compare.set_defaults(command=_compare, overrides=[])
    _add_convert(commands.add_parser("convert", help="convert a model from Hugging Face to Megatron, or back"))
    inspect = commands.add_parser(
        "inspect",
        help="describe the contents of a folder",
        description="Describe a Hugging Face folder, a run, one of its checkpoints or a Megatron checkpoint, and "
        "report damage. Exit code 2 if anything is damaged.",
    )
    inspect.add_argument("path", type=Path, metavar="PATH")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.add_argument("--digests", action="store_true", help="compare the digests of a run checkpoint's files")
    inspect.set_defaults(command=_inspect, overrides=[])
    return parser


def _add_convert(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Convert a Hugging Face folder to a Megatron checkpoint, or a Megatron checkpoint or a run of this trainer to "
        "a Hugging Face folder. The result is read back and compared before it is renamed to TARGET."
    )
    command.add_argument("source", type=Path, metavar="SOURCE", help="folder, run, or checkpoint")
    command.add_argument("target", type=Path, metavar="TARGET", help="a new path")
    command.add_argument("--to", choices=("megatron", "huggingface"), help="require this target format")
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="dtype of the weights (default: the source's)"
    )
    command.add_argument(
        "--like", type=Path, metavar="FOLDER", help="Hugging Face folder with the model's config.json and tokenizer"
    )
    command.add_argument("--shard-gb", type=float, default=5.0, metavar="N", help="largest safetensors file, in GB")
    command.add_argument(
        "--verify",
        nargs="?",
        const=VERIFY_TEXT,
        metavar="TEXT",
        help="compare both models' logits of a text; needs memory for one whole model",
    )
    command.set_defaults(command=_convert, overrides=[])


def _add_plan(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Estimate the memory of every GPU and the time of a step for the run that CONFIG describes. Needs no GPU, only "
        "CONFIG and the model's config.json. Exit code 2 if the run does not fit."
    )
    command.add_argument("config", type=Path, metavar="CONFIG", help="YAML file; see examples/")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. parallel.tensor=2")
    command.add_argument("--gpu", default="H100", metavar="NAME", help="GPU model (default: %(default)s)")
    command.add_argument("--ranks", type=int, metavar="N", help="trainer ranks (default: the fewest of the layout)")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(command=_plan)


def _add_configuration(command: argparse.ArgumentParser, example: str) -> None:
    command.add_argument("overrides", nargs="*", metavar="key=value", help=example)
    command.add_argument(
        "--dry-run", action="store_true", help="run all checks, write nothing, print the configuration"
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
        raise ConfigError("--ranks", options.ranks, "none without --dry-run", "set the number of ranks in the launcher")
    streams.keep_going()
    from sdpg_megatron.train.loop import RunOutcome, done_message, train

    outcome = train(config, branch_from)
    if outcome is RunOutcome.ALREADY_DONE and environment.is_main:
        sys.stdout.write(done_message(config) + "\n")
    return STOPPED if outcome is RunOutcome.INTERRUPTED else 0


def _branch_request(options: argparse.Namespace) -> BranchRequest | None:
    if options.branch_from is None:
        if options.new_reference:
            raise ConfigError("--new-reference", True, "--branch-from as well", "add --branch-from RUN[@STEP]")
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
    """Print passed checks to standard error, one line each, then the configuration to standard output."""
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
        sys.stdout.write(f"{options.out}: problems with their responses, *.jsonl; all numbers, summary.json\n")
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
    if not 1 <= gigabytes * 10**9 < math.inf:  # also false for NaN
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
