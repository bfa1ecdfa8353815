"""Fuzz the command line: run commands with random faults, and count those that fail without a typed error.

    python benchmarks/fuzz.py --cases 10000 --seed 0 --jobs 2 --out benchmarks/results/fuzz.json
    python benchmarks/fuzz.py --seed 0 --only 137          repeat one case, keep its files, show its output

A case is a command of ``sdpg-megatron`` with a random configuration, data file, model folder, checkpoint or environment
(benchmarks/fuzz_cases.py), usually with one to three faults. It runs in a fork of a process that has imported
everything, in a new session and folder, with a memory limit. A case may succeed, as the command may not read the fault.

    cases    number of calls
    untyped  calls that ended with a traceback, by a signal that was not sent, with an undocumented exit code, or with
             an error code and no message
    hangs    calls that did not end within their time limit

The last line of standard output is the JSON of these three. Standard error names each faulty case. The exit code is 1
if one of the last two is not 0.
"""

from __future__ import annotations

import argparse
import codecs
import json
import multiprocessing
import multiprocessing.context
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

if not __package__:  # run as a script: sys.path starts with the script's folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.fuzz_cases import CHECKPOINT, MODELS, RUN, VERIFIER, VERIFIER_CODE, Case, draw_case

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTED = (0, 2, 70, 75, 130, 141)
"""Exit codes of `sdpg_megatron.cli.main`; 2 is for errors."""
MEMORY = 8 << 30
"""Limit of a call's address space in bytes, besides that of the imports."""
IMPORTED = (
    *(f"sdpg_megatron.train.{name}" for name in ("loop", "eval_command", "eval_target")),
    *(f"sdpg_megatron.estimate.{name}" for name in ("plan", "report", "advice")),
    *(
        "sdpg_megatron.cli",
        "sdpg_megatron.estimate.shapes",
        "sdpg_megatron.convert.command",
        "sdpg_megatron.convert.inspect",
    ),
    *(f"transformers.models.{name}.modeling_{name}" for name in MODELS),
    *("sdpg_megatron.evaluation.compare", "pyarrow.parquet", "matplotlib.pyplot"),
    "tensorboard.summary.writer.record_writer",
)
TOLD = 1200
"""Characters of a faulty case's standard error in the output."""


@dataclass(slots=True)
class Result:
    """The output. The JSON has exactly these keys."""

    cases: int = 0
    untyped: int = 0
    hangs: int = 0


def prepare(folder: Path) -> None:
    """Write tiny models, a Megatron checkpoint and a finished run of two steps with an evaluation.

    Runs in a separate process, because a process cannot fork after it has computed with several threads.
    """
    from sdpg_megatron.cli import main
    from tests.tiny import write_tiny_model

    for family in MODELS:
        write_tiny_model(folder / family, family, tied=False, seed=1, layers=2, hidden=32, heads=2, kv_heads=1)
    case = folder / "case"
    case.mkdir()
    config = draw_case_of_run(case, folder)
    assert main(["train", config, "steps=2", f"run_dir={folder / RUN}"]) == 0
    assert main(["convert", str(folder / MODELS[0]), str(folder / CHECKPOINT)]) == 0


def draw_case_of_run(case: Path, folder: Path) -> str:
    """Write the configuration for resuming damaged runs, and its data."""
    import yaml

    from benchmarks.fuzz_cases import base

    (case / f"{VERIFIER}.py").write_text(VERIFIER_CODE)
    tree = base(random.Random(0), folder, case)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**tree, "reward": {"verifier": "number"}}))
    return str(path)


def import_everything() -> None:
    """Import the modules of all commands, in one thread."""
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
    import importlib

    for name in IMPORTED:
        importlib.import_module(name)
    import psutil

    assert psutil.Process().num_threads() == 1, "an import started threads, which forks do not have"


def attempt(case: Case, folder: Path) -> tuple[int | None, str]:
    """Run a case. Returns its exit code (negative for a signal, None for a hang) and its standard error."""
    (folder / "stderr").touch()  # a signal may arrive before the call opens it
    started = time.monotonic()
    child = os.fork()
    if not child:
        os._exit(call(case, folder))
    pending, code = list(case.signals), None
    while time.monotonic() - started < case.limit:
        while pending and time.monotonic() - started >= pending[0][0]:
            os.kill(child, pending.pop(0)[1])
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        time.sleep(0.005)
    with suppress(ProcessLookupError):  # its child processes, and the call if it hangs
        os.killpg(child, signal.SIGKILL)
    if code is None:
        os.waitpid(child, 0)
    return code, (folder / "stderr").read_text(errors="replace")


def call(case: Case, folder: Path) -> int:
    """Run in the process of one call. Returns its exit code."""
    os.setsid()
    os.chdir(folder)
    os.environ.update({"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", **case.environment})
    sys.path[:0] = [str(folder)]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    replace_streams(case, folder)
    from sdpg_megatron.estimate import shapes
    from sdpg_megatron.rewards import pool
    from tests.e2e.preloaded import run_as_main

    shapes.subprocess = Forking  # type: ignore[assignment]
    pool.multiprocessing = Forking  # type: ignore[assignment]
    return run_as_main("sdpg_megatron", *case.arguments)


class Forking:
    """Replacement of `subprocess` and `multiprocessing` in dry runs, with forks, because imports take seconds.

    The forks run the same code as the processes, with the imports done.
    """

    active_children = staticmethod(multiprocessing.active_children)

    @staticmethod
    def get_context(method: str) -> multiprocessing.context.BaseContext:
        assert method == "spawn"
        return multiprocessing.get_context("fork")

    @staticmethod
    def run(
        command: Sequence[str], *, input: str, env: dict[str, str], **_: object
    ) -> subprocess.CompletedProcess[str]:
        """Run ``python [options] -m MODULE`` in a fork and capture its output."""
        from tests.e2e.preloaded import run_as_main

        folder = Path(tempfile.mkdtemp())  # a TemporaryDirectory would be removed when the fork ends
        paths = [folder / name for name in ("in", "out", "err")]
        paths[0].write_text(input, "utf-8")
        child = os.fork()
        if not child:
            os.environ.clear()
            os.environ.update(env)
            for number, path in enumerate(paths):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY), number)
            sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
            sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            os._exit(run_as_main(command[-1]))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out, err = (path.read_text("utf-8") for path in paths[1:])
        shutil.rmtree(folder)
        return subprocess.CompletedProcess(command, code, out, err)


def replace_streams(case: Case, folder: Path) -> None:
    """Replace the streams: empty standard input, standard error to a file, standard output to a file or to a fault.

    Faults are a closed stream, a full disk and a broken pipe. Output streams have the encoding that Python would use in
    the case's environment.
    """
    match case.stdout:
        case "full":
            out = os.open("/dev/full", os.O_WRONLY)
        case "gone":
            reader, out = os.pipe()
            os.close(reader)
        case _:
            out = os.open(folder / "stdout", os.O_WRONLY | os.O_CREAT)
    for descriptor, number in (
        (os.open(os.devnull, os.O_RDONLY), 0),
        (out, 1),
        (os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2),
    ):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    encoding, errors = encoding_of(os.environ)
    sys.stdout = open(1, "w", encoding=encoding, errors=errors, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding=encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
    if case.stdout == "closed":
        os.close(1)
        sys.stdout = None  # type: ignore[assignment]  # as in Python when started with a closed stream


def encoding_of(environment: Mapping[str, str]) -> tuple[str, str]:
    """Encoding and error handler of Python's standard output; UTF-8 for every locale of the cases.

    An unknown encoding is ignored, because Python would not start with it.
    """
    encoding, _, errors = environment.get("PYTHONIOENCODING", "").partition(":")
    try:
        return codecs.lookup(encoding).name, errors or "strict"
    except LookupError:
        plain = any(environment.get(name) for name in ("LC_ALL", "LANG"))
        return "utf-8", "surrogateescape" if plain else "strict"


def verdict(case: Case, code: int | None, said: str) -> str | None:
    """Reason for which a call counts as untyped; None if it does not."""
    if code is None or "Traceback (most recent call last)" in said:
        return None if code is None else "a traceback"
    sent = [number for _, number in case.signals]
    if code < 0:
        return None if -code in sent else f"killed by signal {-code}"
    if code - 128 in sent[1:]:  # a second signal ends a run immediately
        return None
    if code not in DOCUMENTED:
        return f"exit code {code}"
    if code == 2 and "plan" not in case.arguments and "inspect" not in case.arguments and not said.strip():
        return "exit code 2 without a message"
    return None


def fuzz(seed: int, numbers: Sequence[int], prepared: Path, scratch: Path, keep: bool) -> tuple[Result, Counter[str]]:
    """Run cases in sequence. Returns the counts, and the exit codes by kind of case."""
    result, codes = Result(), Counter[str]()
    for number in numbers:
        folder = scratch / str(number)
        folder.mkdir(parents=True)
        case = draw_case(random.Random(f"{seed}/{number}"), prepared, folder)
        code, said = attempt(case, folder)
        result.cases += 1
        codes[f"{case.kind}: {code}"] += 1
        why = "hangs" if code is None else verdict(case, code, said)
        result.hangs += code is None
        result.untyped += code is not None and why is not None
        if why or keep:
            show(number, case, why, code, said)
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    return result, codes


def share(seed: int, numbers: Sequence[int], prepared: Path, scratch: Path, jobs: int) -> tuple[Result, Counter[str]]:
    """Run `fuzz` in several forks, each with every n-th case. `multiprocessing` would own the cases as children."""
    result, codes = Result(), Counter[str]()
    readers = []
    for job in range(jobs):
        reader, writer = os.pipe()
        if not os.fork():
            try:
                found, by_kind = fuzz(seed, numbers[job::jobs], prepared, scratch, keep=False)
                os.write(writer, json.dumps([asdict(found), by_kind]).encode())
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        os.close(writer)
        readers.append(reader)
    for reader in readers:
        with open(reader, encoding="utf-8") as stream:
            text = stream.read()
        if not text:
            raise SystemExit("a job has ended before its last case; its error is above")
        found, by_kind = json.loads(text)
        for name, count in found.items():
            setattr(result, name, getattr(result, name) + count)
        codes.update(by_kind)
    return result, codes


def show(number: int, case: Case, why: str | None, code: int | None, said: str) -> None:
    environment = " ".join(f"{name}={text!r}" for name, text in case.environment.items())
    sent = f" signals {case.signals}" if case.signals else ""
    lines = (
        f"--- case {number} ({case.kind}): {why or f'exit code {code}'}",
        f"{environment} sdpg-megatron {' '.join(map(repr, case.arguments))}; stdout {case.stdout}{sent}",
        said[-TOLD:],
    )
    sys.stderr.write("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="NUMBER")
    parser.add_argument("--jobs", type=int, default=1, help="concurrent cases (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON; FILE.meta.json describes the run")
    options = parser.parse_args()
    started = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="sdpg-fuzz-"))
    script = "import sys, pathlib; from benchmarks.fuzz import prepare; prepare(pathlib.Path(sys.argv[1]))"
    prepared = scratch / "prepared"
    prepared.mkdir()
    made = subprocess.run([sys.executable, "-c", script, str(prepared)], cwd=ROOT, capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(made.stderr)
    import_everything()
    if options.only is not None:
        result, codes = fuzz(options.seed, [options.only], prepared, scratch, keep=True)
    else:
        result, codes = share(options.seed, range(options.cases), prepared, scratch, options.jobs)
    for line, count in sorted(codes.items()):
        sys.stderr.write(f"{line}: {count}\n")
    if options.only is None:
        shutil.rmtree(scratch, ignore_errors=True)
    else:
        sys.stderr.write(f"files: {scratch}\n")
    sys.stdout.write(json.dumps(asdict(result)) + "\n")
    if options.out:
        from benchmarks.head import write_json

        meta = {
            "command": f"python benchmarks/fuzz.py --cases {options.cases} --seed {options.seed} --jobs {options.jobs}",
            "date": datetime.now(UTC).date().isoformat(),
            "python": platform.python_version(),
            "seconds": round(time.monotonic() - started),
            "exit_codes": dict(sorted(codes.items())),
        }
        write_json(options.out, asdict(result))
        write_json(options.out.with_name(f"{options.out.name}.meta.json"), meta)
    return int(result.untyped + result.hangs > 0)


if __name__ == "__main__":
    sys.exit(main())
