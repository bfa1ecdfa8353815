"""Kill and resume runs repeatedly, and compare the results with an undisturbed run.

    python benchmarks/crash.py
    python benchmarks/crash.py --kills 100 --seed 0 --out benchmarks/results/crash.json

Each run trains the tests' tiny model for `--steps` steps on two ranks (two pipeline stages), with a checkpoint after
each step. Every second run writes checkpoints asynchronously, and two of four generate one step ahead. A run is killed
(SIGKILL) several times, restarted by the same command each time, and finally left to finish. A kill ends a rank or the
launcher. Every second kill is at a random time between start and end, the others at a random place in the code, mostly
inside a save: see tests/e2e/dying.py. The seed determines everything except the progress of a run at a random time.

The launcher below starts the ranks as forks of a process that has imported everything, so a start takes one second
instead of ten. As with torchrun, it ends all ranks when one fails, and the system ends its ranks when it is killed
(tests/e2e/test_crash.py checks this with torchrun).

    kills       number of kills
    resumes     restarts that resumed from a checkpoint; the others began again
    mismatches  lines of metrics (without times) and tensors of the trained model that differ in a bit
    lost        prompts that the undisturbed run trained on and this run did not, by prompts.jsonl
    doubled     prompts that this run trained on more often
    broken      incomplete checkpoints found after a kill

The exit code is 1 if one of the last four is not 0. A start that fails before its kill ends the benchmark with the
output of the ranks.

Kills of the rollout server are tested by tests/sglang/test_train.py, with a real server, whose samples are not
bit-identical between batches.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shlex
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: sys.path starts with the script's folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

RANKS = 2
SETTINGS = {
    "checkpoint": {"every": 1, "keep": 2},
    "eval": {"every": 4, "samples": 2},
    "parallel": {"pipeline": RANKS},
}
AHEAD = ("rollout.ahead=1", "objective.correction=truncate")
KILLS_PER_RUN = 10
ON_EVERY_RANK = ("update", "begun", "writer")
"""Moments that occur on every rank; the others occur on rank 0 only."""
PRELOADED = (
    "tests.e2e.dying", "sdpg_megatron.train.loop", "sdpg_megatron.train.inputs", "sdpg_megatron.rollout.hf",
    "tensorboard.summary.writer.record_writer", "matplotlib.pyplot", "transformers.models.qwen3.modeling_qwen3",
)  # fmt: skip
LIMIT = 600.0
"""Timeout in seconds of one start of a run."""
TOLD = 3000
"""Characters of a rank's last output in an error."""


@dataclass(slots=True)
class Result:
    """The output. The JSON has exactly these keys."""

    kills: int = 0
    resumes: int = 0
    mismatches: int = 0
    lost: int = 0
    doubled: int = 0
    broken: int = 0


@dataclass(frozen=True, slots=True)
class Death:
    """A planned kill."""

    of_launcher: bool
    rank: int
    """The rank that is killed, or that kills the launcher."""
    moment: str | None
    """Place in the code at which the rank kills itself; None for a kill at a time."""
    count: int
    share: float
    """Time of the kill, as a share of the undisturbed run's seconds."""


def draw_death(draw: random.Random, moments: Sequence[str]) -> Death:
    of_launcher, rank, count, share = draw.random() < 0.5, draw.randrange(RANKS), draw.randint(1, 2), draw.random()
    moment = None if draw.random() < 0.5 else draw.choice(list(moments))
    return Death(of_launcher, rank if moment in (None, *ON_EVERY_RANK) else 0, moment, count, share)


# --- in the launcher and its ranks


def launch(config: str, overrides: Sequence[str], death: Death | None, scratch: str) -> None:
    """Start the ranks, and end all of them when one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [fork_rank(rank, port, config, overrides, death, scratch) for rank in range(RANKS)]
    Path(scratch, "pids").write_text(json.dumps(ranks))
    left, code = set(ranks), 0
    while left:
        pid, status = os.wait()
        if pid in left:
            left.remove(pid)
            code = code or abs(os.waitstatus_to_exitcode(status))
            if code:
                for other in left:
                    os.kill(other, signal.SIGKILL)
    os._exit(code)


def fork_rank(rank: int, port: int, config: str, overrides: Sequence[str], death: Death | None, scratch: str) -> int:
    launcher = os.getpid()
    if pid := os.fork():
        return pid
    code = 1
    try:
        log = os.open(str(Path(scratch, f"rank{rank}.log")), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="crash",
        )  # fmt: skip
        from sdpg_megatron.cli import main
        from tests.e2e import dying

        os.environ[dying.STRUCK] = str(Path(scratch, "struck"))
        if death is not None and death.moment is not None and death.rank == rank:
            if death.of_launcher:
                dying.die = lambda: dying.kill(launcher)
            dying.MOMENTS[death.moment](death.count)
        code = main(["train", config, *overrides])
        sys.stdout.flush()
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


# --- in the parent


class Runner:
    """Starts runs, each in a folder, kills them and compares them with the undisturbed run."""

    def __init__(self, scratch: Path, seed: int, steps: int) -> None:
        from tests.e2e.dying import MOMENTS

        self.scratch, self.steps = scratch, steps
        self.draw = random.Random(f"crash/{seed}")
        self.moments = sorted(MOMENTS)
        self.result = Result()
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["__main__", *PRELOADED])
        self.struck: Counter[str] = Counter()

    def take_time(self) -> None:
        """Time an undisturbed run. It is not the first run, which imports modules."""
        config = self._whole(ahead=False).with_name("run.yaml")
        self._start(config, ("run_dir=" + str(self.scratch / "timed"),), None)
        self.seconds = self.last_seconds

    def _whole(self, *, ahead: bool) -> Path:
        """Folder of the undisturbed run for comparison."""
        name = "whole-ahead" if ahead else "whole"
        if not (self.scratch / name).exists():
            self._start(self._write(name), AHEAD if ahead else (), None)
        return self.scratch / name / "run"

    def _write(self, name: str) -> Path:
        from tests.e2e.runs import write_run

        folder = self.scratch / name
        folder.mkdir()
        return write_run(folder, steps=self.steps, **SETTINGS)

    def _start(self, config: Path, overrides: Sequence[str], death: Death | None) -> bool:
        """Start a run and wait for its end. Returns True if `death` ended it.

        Raises:
            RuntimeError: the run failed without a kill. Has the output of the ranks.
        """
        pids, struck = config.parent / "pids", config.parent / "struck"
        for left in (pids, struck, *config.parent.glob("rank*.log")):
            left.unlink(missing_ok=True)
        started = time.perf_counter()
        launcher: Any = self.context.Process(
            target=launch, args=(str(config), list(overrides), death, str(config.parent))
        )
        launcher.start()
        if death is not None and death.moment is None:
            launcher.join(death.share * self.seconds)
            ranks = json.loads(pids.read_text()) if pids.exists() else []
            if launcher.is_alive() and ranks:
                with suppress(ProcessLookupError):  # the rank has finished
                    os.kill(launcher.pid if death.of_launcher else ranks[death.rank], signal.SIGKILL)
                    struck.touch()
        launcher.join(LIMIT)
        if launcher.is_alive():
            launcher.kill()
            raise RuntimeError(f"timeout after {LIMIT:g} s; {last_output(config.parent)}")
        wait_until_gone(json.loads(pids.read_text()) if pids.exists() else [])
        self.last_seconds = time.perf_counter() - started
        if launcher.exitcode and not struck.exists():
            raise RuntimeError(f"exit code {launcher.exitcode} without a kill; {last_output(config.parent)}")
        return bool(launcher.exitcode)

    def torment(self, number: int, kills: int) -> None:
        """Start a run, kill it up to `kills` times, and compare it."""
        config = self._write(f"run{number}")
        ahead = bool(number & 2)
        overrides = [f"checkpoint.asynchronous={str(bool(number % 2)).lower()}", *(AHEAD if ahead else ())]
        for _ in range(kills):
            death = draw_death(self.draw, self.moments)
            if not self._start(config, overrides, death):
                break
            self.result.kills += 1
            self.struck["launcher" if death.of_launcher else "rank"] += 1
            self._look_at(config.parent / "run")
        else:
            self._start(config, overrides, None)
        self._compare(config.parent / "run", self._whole(ahead=ahead))

    def _look_at(self, run: Path) -> None:
        from sdpg_megatron.checkpoint.files import find_damage
        from sdpg_megatron.checkpoint.state import MANIFEST, RunState, checkpoint_folders
        from sdpg_megatron.errors import CheckpointError

        found = checkpoint_folders(run / "checkpoints")
        self.result.resumes += bool(found)
        for path in found:
            try:
                damage = find_damage(path, RunState.read(path / MANIFEST).files, digests=True)
            except CheckpointError as error:
                damage = error
            self.result.broken += damage is not None

    def _compare(self, run: Path, whole: Path) -> None:
        import torch  # not at the top: the ranks' verifier processes import this module without needing torch

        from tests.e2e.runs import weights

        self.result.mismatches += differing(metrics_lines(whole), metrics_lines(run))
        ours, theirs = weights(run), weights(whole)
        self.result.mismatches += sum(
            name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
            for name in ours.keys() | theirs.keys()
        )
        expected, found = learned(whole), learned(run)
        self.result.lost += (expected - found).total()
        self.result.doubled += (found - expected).total()


def wait_until_gone(pids: Sequence[int]) -> None:
    """Poll until all processes have ended. Ranks of a killed launcher are not child processes of this one."""
    deadline = time.monotonic() + 60
    while any(is_alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            raise RuntimeError(f"ranks {pids} are still running after their launcher ended")
        time.sleep(0.02)


def last_output(folder: Path) -> str:
    """Last output of each rank of a start."""
    logs = sorted(folder.glob("rank*.log"))
    return "\n".join(["the ranks' output:", *(f"[{log.stem}] {log.read_text()[-TOLD:]}" for log in logs)])


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def metrics_lines(run: Path) -> list[dict[str, Any]]:
    """Metrics of a run, without times."""
    from tests.e2e.runs import TIMES

    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if not name.startswith(TIMES)} for line in lines]


def differing(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> int:
    pairs = zip(expected, found, strict=False)
    return sum(one != other for one, other in pairs) + abs(len(expected) - len(found))


def learned(run: Path) -> Counter[tuple[int, str]]:
    """Number of times that each step trained on each prompt."""
    lines = (json.loads(line) for line in (run / "prompts.jsonl").read_text().splitlines())
    return Counter((line["step"], uid) for line in lines for uid in line["prompts"])


def main(argv: Sequence[str] | None = None) -> int:
    import torch

    from benchmarks.head import machine, write_json

    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks/crash.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("--kills", type=int, default=100, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="steps per run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON; FILE.meta.json describes the run")
    arguments = parser.parse_args(argv)
    os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    root = str(Path(__file__).resolve().parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="crash-benchmark-") as folder:
        runner = Runner(Path(folder), arguments.seed, arguments.steps)
        runner.take_time()
        number = 0
        while (left := arguments.kills - runner.result.kills) > 0:
            runner.torment(number, min(left, KILLS_PER_RUN))
            number += 1
            sys.stderr.write(f"{asdict(runner.result)} in {number} runs, {time.perf_counter() - started:.0f} s\n")
    result = asdict(runner.result)
    sys.stdout.write(json.dumps(result) + "\n")
    if arguments.out:
        write_json(arguments.out, result)
        meta = {
            "command": shlex.join(["python", "benchmarks/crash.py", *(sys.argv[1:] if argv is None else argv)]),
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine("cpu", 1),
            "torch": torch.__version__,
            "runs": number,
            "of": dict(runner.struck),
            "seconds": round(time.perf_counter() - started),
        }
        write_json(arguments.out.with_name(f"{arguments.out.name}.meta.json"), meta)
    return int(any(result[name] for name in ("mismatches", "lost", "doubled", "broken")))


if __name__ == "__main__":
    sys.exit(main())
