"""Start and stop one SGLang server on this machine.

    this process --(pipe: job, then the order to stop)--> process_guard.py --> serve.py, the server --> its ranks

The guard, the server and its ranks form one session and process group. The guard ends the others on request or when
this process is gone, removes API keys from the server's output, and exits with the server.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sdpg_megatron.errors import RolloutError, fix_of, reason_of
from sdpg_megatron.rollout.sglang import process_guard, serve
from sdpg_megatron.rollout.sglang.interpreter import check_interpreter

PORTS = range(20000, 30000)
"""Range of free ports, below those that Linux gives to outgoing connections: a server listens only once its model is
loaded, and an outgoing connection could take its port until then."""
TRIES = 64
MARGIN = 2 * process_guard.KILL_LIMIT + 5
"""Seconds for the guard beyond the server's grace period."""
TAIL_BYTES = 64 * 1024
LAUNCHER_VARIABLES = ("TORCHELASTIC_", "GROUP_", "ROLE_", "LOCAL_", "MASTER_")
"""Prefixes of torchrun's variables. With TORCHELASTIC_USE_AGENT_STORE, the server's ranks would wait for a store that
does not exist."""
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Variables of the trainer's allocator. SGLang's memory saver refuses expandable segments."""
RANK_VARIABLES = ("RANK", "WORLD_SIZE")
NO_PROXY = "no_proxy", "NO_PROXY"
"""Programs differ in the spelling that they read or prefer."""
LOOPBACK = "localhost", "127.0.0.1", "::1"
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""For glibc: receive each bucket into the memory of the previous one, as new memory is several times slower to fill. A
server then keeps its peak memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Settings of one server."""

    model: Path
    """Hugging Face folder."""
    log: Path
    """The server's output is appended here, without the keys."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int | None = None
    """None for a free port."""
    tensor: int = 1
    data: int = 1
    dtype: str
    """SGLang's name: float32, bfloat16, float16."""
    device: Literal["cpu", "cuda"]
    mem_fraction: float | None = None
    """Share of the device's memory for weights and KV cache; None for SGLang's choice."""
    base_gpu: int = 0
    """Device number of its first rank (CUDA only)."""
    memory_saver: bool = False
    """Allow the server to release its memory on request (CUDA only)."""
    experts: bool = False
    """Return the experts that each token was routed to."""
    seed: int = 0
    python: str
    """Interpreter with sglang."""
    arguments: tuple[str, ...] = ()
    """More arguments of sglang.launch_server; they override those from the fields above."""
    api_key: str | None = field(default=None, repr=False)
    admin_key: str | None = field(default=None, repr=False)


class ServerProcess:
    """At most one running server. Not thread-safe."""

    def __init__(self, launch: Launch) -> None:
        """Reserve a port. Raises `RolloutError` if `launch.host` is not an address of this machine, or has no free
        port."""
        self.launch = launch
        self.starts = 0
        """Number of starts."""
        self._guard: subprocess.Popen[bytes] | None = None
        self._held: socket.socket | None = None
        if launch.port is None:
            self._held = hold_free_port(launch.host)
            self.port: int = self._held.getsockname()[1]
        else:
            self.port = launch.port
        self.url = f"http://{_reachable(launch.host)}:{self.port}"

    def start(self) -> None:
        """Start the server without waiting for it to answer. A stopped server may be started again.

        Raises:
            RolloutError: the interpreter does not run or has no sglang, the port is taken, or the log cannot be
                written. Nothing is left running.
        """
        if self.alive():
            raise RolloutError(f"{self.url}: the server is running already. Fix: stop it first")
        self._end(0.0)
        check_interpreter(self.launch.python)
        if self._held is None:
            self._held = hold_port(self.launch.host, self.port)
        job: process_guard.Job = {
            "command": command(self.launch, self.port),
            "parent": os.getpid(),
            "input": json.dumps(_keys(self.launch)),
            "secrets": list(_keys(self.launch).values()),
        }
        self._guard = self._start_guard(job)
        self.starts += 1

    def _start_guard(self, job: process_guard.Job) -> subprocess.Popen[bytes]:
        try:
            self.launch.log.parent.mkdir(parents=True, exist_ok=True)
            with self.launch.log.open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-I", process_guard.__file__],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C goes to the trainer alone, which then stops the server
                    env=environment(self.launch, os.environ),
                )
        except OSError as error:
            raise RolloutError(
                f"{self.launch.log}: the server's log cannot be written ({reason_of(error)}). "
                f"Fix: {fix_of(error, self.launch.log)}"
            ) from error
        _tell(process, json.dumps(job))
        return process

    @property
    def pid(self) -> int | None:
        """Process id of the guard and of the server's session and process group; None when stopped."""
        return None if self._guard is None else self._guard.pid

    def alive(self) -> bool:
        """True if the process is running, even if it does not answer."""
        return self._guard is not None and self._guard.poll() is None

    def log_tail(self, lines: int = 20) -> str:
        """Last lines of the log, with the last state of each progress bar."""
        try:
            with self.launch.log.open("rb") as log:
                log.seek(max(0, os.fstat(log.fileno()).st_size - TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except OSError as error:
            return f"(the log cannot be read: {reason_of(error)})"
        return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.splitlines()[-lines:])

    def stop(self, grace: float = 10.0) -> None:
        """End the server and all its child processes, if any.

        Args:
            grace: seconds for the server to end by itself; 0 to kill it at once.
        """
        self._end(grace)
        if self._held is not None:
            self._held.close()
            self._held = None

    def _end(self, grace: float) -> None:
        process, self._guard = self._guard, None
        if process is not None:
            end(process, grace)


def command(launch: Launch, port: int) -> list[str]:
    """The server's command line, without keys."""
    arguments = {
        "--model-path": str(launch.model.absolute()),
        "--host": launch.host,
        "--port": str(port),
        "--dtype": launch.dtype,
        "--tp-size": str(launch.tensor),
        "--dp-size": str(launch.data),
        "--random-seed": str(launch.seed),
        "--device": launch.device,
    }
    flags = ["--enable-return-routed-experts"] if launch.experts else []
    if launch.mem_fraction is not None:
        arguments["--mem-fraction-static"] = str(launch.mem_fraction)
    if launch.device == "cpu":
        arguments |= {"--attention-backend": "torch_native", "--sampling-backend": "pytorch"}
        # An idle server would otherwise keep a core of the trainer busy.
        flags += ["--disable-overlap-schedule", "--sleep-on-idle"]
    else:
        arguments["--base-gpu-id"] = str(launch.base_gpu)
        flags += ["--enable-memory-saver"] if launch.memory_saver else []
    pairs = [part for pair in arguments.items() for part in pair]
    return [launch.python, serve.__file__, *pairs, *flags, *launch.arguments]


def environment(launch: Launch, base: Mapping[str, str]) -> dict[str, str]:
    """Environment of a server: `base` without torchrun's and the trainer's variables, and without values that are keys.

    No proxy is used for the run's own hosts, as a starting server sends its API key in a health check to itself.
    Another interpreter does not get `PYTHONPATH`, which has the trainer's packages.
    """
    secrets = _keys(launch).values()
    dropped = (*RANK_VARIABLES, *ALLOCATOR_VARIABLES, *(("PYTHONPATH",) if launch.python != sys.executable else ()))
    found = {
        name: value
        for name, value in base.items()
        if not name.startswith(LAUNCHER_VARIABLES) and name not in dropped and value not in secrets
    }
    found["PYTHONUNBUFFERED"] = "1"
    found |= dict.fromkeys(NO_PROXY, _no_proxy(base, [launch.host, base.get("MASTER_ADDR", ""), socket.gethostname()]))
    if launch.device == "cpu":
        found["SGLANG_USE_CPU_ENGINE"] = "1"
        for name, value in KEEP_FREED_MEMORY.items():
            found.setdefault(name, value)
        if (ranks := launch.tensor * launch.data) > 1:
            found.setdefault("SGLANG_CPU_OMP_THREADS_BIND", _share_cores(ranks))
    return found


def _no_proxy(base: Mapping[str, str], hosts: Sequence[str]) -> str:
    """Add the loopback and `hosts` to the user's list, which may be in either spelling."""
    listed = [entry.strip() for name in NO_PROXY for entry in base.get(name, "").split(",")]
    if "*" in listed:
        return "*"  # a wildcard only if it stands alone
    return ",".join(dict.fromkeys(entry for entry in (*listed, *LOOPBACK, *hosts) if entry))


def _share_cores(ranks: int) -> str:
    """Cores of each rank in SGLang's format. By default SGLang allows at most one CPU rank per socket."""
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[rank::ranks] or [cores[rank % len(cores)]] for rank in range(ranks)]
    return "|".join(",".join(map(str, share)) for share in shares)


def _keys(launch: Launch) -> dict[str, str]:
    keys = {"--api-key": launch.api_key, "--admin-api-key": launch.admin_key}
    return {name: key for name, key in keys.items() if key}


# --- ports


def _address(host: str, port: int) -> tuple[socket.AddressFamily, tuple[object, ...]]:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise RolloutError(f"{host}: not an address ({reason_of(error)}). Fix: set rollout.sglang.host") from error
    return family, address


def _bind(host: str, port: int, *, alone: bool) -> socket.socket:
    """Reserve a port that the server can still bind.

    Linux lets a second socket bind to a port if both set SO_REUSEADDR and none listens. Servers set it; outgoing
    connections and binds to port 0 do not get the port.

    Args:
        alone: fail if the port is in use in any way, also by another reservation or a closed connection.
    """
    family, address = _address(host, port)
    held = socket.socket(family, socket.SOCK_STREAM)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(not alone))
        held.bind(address)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    except OSError:
        held.close()
        raise
    return held


def hold_port(host: str, port: int) -> socket.socket:
    """Reserve a port until the socket is closed. Raises `RolloutError`."""
    try:
        return _bind(host, port, alone=False)
    except OSError as error:
        raise RolloutError(
            f"port {port} of {host} cannot be used ({error.strerror}). Fix: end what listens there, choose another in "
            "rollout.sglang.ports, or leave that empty for free ones"
        ) from error


def hold_free_port(host: str) -> socket.socket:
    """Reserve one of `PORTS` until the socket is closed. Raises `RolloutError`."""
    error: OSError | None = None
    # The global generator's seed would give every run on the machine the same ports.
    for port in random.SystemRandom().sample(PORTS, TRIES):
        try:
            return _bind(host, port, alone=True)
        except OSError as found:
            error = found
    reason = "all that were tried are taken" if error is None else reason_of(error)
    raise RolloutError(
        f"{host}: no port can be used ({reason}). Fix: set rollout.sglang.host to an address of this machine"
    )


def _reachable(host: str) -> str:
    """`host` for a URL; the loopback for a wildcard address."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


# --- the guard


def _tell(process: subprocess.Popen[bytes], line: str) -> None:
    """Send the guard a line, unless it is gone."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(line.encode() + b"\n")
        process.stdin.flush()


def end(process: subprocess.Popen[bytes], grace: float) -> None:
    """End a guard and its process group, also if the guard hangs or was killed."""
    if process.poll() is None:
        _tell(process, str(grace))
        _signal_group(process, signal.SIGCONT)  # the guard itself may have been stopped
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace + MARGIN)
    if process.returncode is None or process.returncode < 0:
        # It hangs, or was killed and could end nothing. The group keeps its number while it has members.
        _signal_group(process, signal.SIGKILL)
        process.wait()
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
