"""Real server processes: that they start, what they answer, how they fail, and that nothing of them stays."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from sdpg_megatron.errors import RolloutError
from sdpg_megatron.rollout.sglang.server import KEEP_FREED_MEMORY, NO_PROXY, Launch, ServerProcess, command, environment
from tests.sglang.conftest import CPU_ARGUMENTS, START_LIMIT, Servers, handles, wait_until_gone

API_KEY, ADMIN_KEY = "it's-\\open-sesame", "admin-sesame-too"
LEAK = "sesame"
"""In both keys, in whatever way they are quoted."""
PROXY_VARIABLES = "http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
SCRIPT = """
import json, os, sys, time
from pathlib import Path
from sdpg_megatron.rollout.sglang.server import Launch, ServerProcess

spec = json.loads(sys.argv[1])
spec |= {"model": Path(spec["model"]), "log": Path(spec["log"]), "arguments": tuple(spec["arguments"])}
process = ServerProcess(Launch(**spec, api_key=os.environ["SERVER_KEY"], admin_key=os.environ["SERVER_ADMIN_KEY"]))
process.start()
if os.fork() == 0:  # like a worker of the trainer's: it keeps the pipe to the guard open
    time.sleep(3600)
print(json.dumps({"url": process.url, "pid": process.pid}), flush=True)
time.sleep(3600)
"""


@dataclass(frozen=True)
class Trainer:
    """A process that has started a server with keys, as a rank of torchrun would."""

    process: subprocess.Popen[str]
    url: str
    session: int
    """Of the server."""
    log: Path

    def call(self, path: str, body: dict[str, Any] | None = None, key: str | None = None) -> Any:
        """The answer's JSON, or its status where there is none."""
        request = urllib.request.Request(
            self.url + path,
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
        )
        try:
            with DIRECT.open(request, timeout=60) as answer:
                text = answer.read().decode()
                return json.loads(text) if text.startswith("{") else answer.status
        except urllib.error.HTTPError as error:
            return error.code


@dataclass(frozen=True)
class Proxy:
    """A proxy that refuses everything."""

    url: str
    asked: list[bytes]
    """What was asked of it."""


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = Proxy(f"http://127.0.0.1:{server.getsockname()[1]}", [])

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        found.asked.append(connection.recv(4096))
                        connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

        threading.Thread(target=serve, daemon=True).start()
        yield found


@pytest.fixture(scope="module", autouse=True)
def trainer(
    sglang_python: str, model: Path, proxy: Proxy, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trainer]:
    """Its server is begun before the first test, and so gets ready while the first tests run."""
    log = tmp_path_factory.mktemp("trainer") / "new" / "server.log"
    spec = {"model": str(model), "log": str(log), "dtype": "float32", "device": "cpu", "python": sglang_python}
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_RANK": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(spec | {"arguments": CPU_ARGUMENTS})],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ
        | torchrun
        | dict.fromkeys(PROXY_VARIABLES, proxy.url)
        | dict.fromkeys(NO_PROXY, "")
        | {"TORCHELASTIC_USE_AGENT_STORE": "True", "SERVER_KEY": API_KEY, "SERVER_ADMIN_KEY": ADMIN_KEY},
    )
    assert process.stdout is not None
    said = json.loads(process.stdout.readline())
    yield Trainer(process, said["url"], said["pid"], log)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    wait_until_gone(said["pid"])


@pytest.fixture(scope="module")
def ready(trainer: Trainer) -> Trainer:
    """The trainer whose server answers."""
    deadline = time.monotonic() + START_LIMIT
    while time.monotonic() < deadline and handles(trainer.session):
        try:
            trainer.call("/health")
            return trainer
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the server does not answer:\n{trainer.log.read_text()[-4000:]}")


def test_a_taken_port_is_refused_before_anything_starts(launch: Callable[..., Launch]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = ServerProcess(launch(port=port))
        with pytest.raises(RolloutError, match=rf"port {port} of 127\.0\.0\.1.*rollout\.sglang\.ports"):
            process.start()
    assert process.pid is None and not process.alive()


def test_free_ports_are_distinct_and_kept(launch: Callable[..., Launch]) -> None:
    processes = [ServerProcess(launch()) for _ in range(20)]
    assert len({process.port for process in processes}) == 20
    with pytest.raises(OSError), socket.socket() as other:
        other.bind(("127.0.0.1", processes[0].port))
    for process in processes:
        process.stop()
    with socket.socket() as other:
        other.bind(("127.0.0.1", processes[0].port))


@pytest.mark.parametrize("python", ["without sglang", "/no/such/python"])
def test_an_interpreter_that_cannot_serve_is_named(launch: Callable[..., Launch], python: str) -> None:
    python = sys.executable if python == "without sglang" else python
    process = ServerProcess(launch(python=python))
    with pytest.raises(RolloutError, match=rf"{python}.*SDPG_SGLANG_PYTHON.*install_sglang_cpu"):
        process.start()
    assert process.pid is None


def test_a_log_that_cannot_be_written_is_named(launch: Callable[..., Launch], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    process = ServerProcess(launch(log=tmp_path / "file" / "log"))
    with pytest.raises(
        RolloutError,
        match=r"file/log: the server's log cannot be written \(File exists\)\. Fix: remove or rename the file",
    ):
        process.start()
    assert process.pid is None


def test_a_folder_without_a_model_ends_the_server_and_the_log_says_why(own_servers: Servers, tmp_path: Path) -> None:
    running = own_servers.begin(model=tmp_path / "nothing")
    session = running.process.pid
    assert session is not None and running.process.alive()
    deadline = time.monotonic() + START_LIMIT
    while running.process.alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running.process.alive()
    assert not handles(session)
    assert str(tmp_path / "nothing") in running.process.log_tail()


def test_a_server_that_hangs_with_its_guard_is_ended(own_servers: Servers) -> None:
    running = own_servers.begin()
    session = running.process.pid
    assert session is not None
    deadline = time.monotonic() + START_LIMIT
    while len(handles(session)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    stopped = handles(session)
    assert len(stopped) == 2
    for process in stopped:
        process.suspend()
    began = time.monotonic()
    running.process.stop(grace=1.0)
    assert time.monotonic() - began < 15
    assert not handles(session) and not running.process.alive()
    running.process.stop()  # twice is harmless


def test_a_killed_guard_takes_the_server_along(own_servers: Servers) -> None:
    running = own_servers.begin()
    session = running.process.pid
    assert session is not None
    time.sleep(2)  # it asks to be killed first of all, and starts others only after seconds of imports
    assert len(handles(session)) == 2
    os.kill(session, signal.SIGKILL)
    wait_until_gone(session)
    assert not running.process.alive()


def test_serves_the_model_as_transformers_computes_it(ready: Trainer, model: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for prompt in ([1, 5, 9], [7], list(range(40, 90))):
        params = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": params, "return_logprob": True}
        answer = ready.call("/generate", body, key=API_KEY)
        tokens = answer["output_ids"]
        assert len(tokens) == 24
        with torch.no_grad():
            logits_TV = reference(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        assert logits_TV.argmax(-1).tolist() == tokens
        expected_T = F.log_softmax(logits_TV, -1)[torch.arange(24), torch.tensor(tokens)]
        found_T = torch.tensor([pair[0] for pair in answer["meta_info"]["output_token_logprobs"]])
        torch.testing.assert_close(found_T, expected_T, atol=1e-3, rtol=0)


def test_keys_are_asked_for_and_shown_nowhere(ready: Trainer) -> None:
    params = {"input_ids": [1, 5], "sampling_params": {"max_new_tokens": 1}}
    assert [ready.call("/generate", params, key) for key in (None, "wrong", ADMIN_KEY)] == [401] * 3
    assert ready.call("/generate", params, API_KEY)["output_ids"]
    assert [ready.call("/flush_cache", {}, key) for key in (None, API_KEY)] == [401] * 2
    assert ready.call("/flush_cache?timeout=10", {}, ADMIN_KEY) == 200
    assert ready.call("/server_info", None, API_KEY)["api_key"] == API_KEY  # the server has it
    for process in handles(ready.session):
        assert LEAK not in " ".join(process.cmdline())
        assert LEAK not in " ".join(process.environ().values())
    log = ready.log.read_text()
    assert LEAK not in log and "'admin_api_key': '***'" in log


def test_a_proxy_is_not_asked_for_the_servers_own_host(ready: Trainer, proxy: Proxy) -> None:
    """A server that starts asks itself whether it is well, and generates: it would end where a proxy refuses that."""
    deadline = time.monotonic() + START_LIMIT
    while ready.call("/health") != 200:  # 503 until it has answered itself
        assert time.monotonic() < deadline and not proxy.asked, proxy.asked
        time.sleep(0.2)
    assert not proxy.asked


def test_a_killed_trainer_takes_even_a_stopped_server_along(ready: Trainer) -> None:
    for process in handles(ready.session):
        if process.pid != ready.session:  # all but the guard
            process.suspend()
    assert len(handles(ready.session)) >= 4
    ready.process.kill()
    ready.process.wait()
    wait_until_gone(ready.session)


def test_the_command_line_of_a_server_with_devices(launch: Callable[..., Launch]) -> None:
    found = command(launch(device="cuda", tensor=2, data=3, memory_saver=True, api_key=API_KEY, arguments=("--x",)), 5)
    assert {"--enable-memory-saver", "--x"} <= set(found) and "--attention-backend" not in found
    values = dict(itertools.pairwise(found))
    assert (values["--tp-size"], values["--dp-size"], values["--port"], values["--device"]) == ("2", "3", "5", "cuda")
    assert API_KEY not in found
    assert "--enable-memory-saver" not in command(launch(memory_saver=True), 5)
    assert "--enable-return-routed-experts" in command(launch(experts=True), 5)
    assert "--enable-return-routed-experts" not in command(launch(), 5)
    assert not {"SGLANG_USE_CPU_ENGINE", *KEEP_FREED_MEMORY} & environment(launch(device="cuda"), {}).keys()


def test_a_cpu_server_keeps_freed_memory_unless_the_user_says_otherwise(launch: Callable[..., Launch]) -> None:
    name, own = "MALLOC_TRIM_THRESHOLD_", "131072"
    assert environment(launch(), {}).items() >= KEEP_FREED_MEMORY.items()
    assert environment(launch(), {name: own})[name] == own != KEEP_FREED_MEMORY[name]


def test_ranks_of_a_cpu_server_share_its_cores(launch: Callable[..., Launch]) -> None:
    shares = environment(launch(tensor=2), {})["SGLANG_CPU_OMP_THREADS_BIND"].split("|")
    assert len(shares) == 2 and all(shares)
    assert environment(launch(tensor=2), {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"})["SGLANG_CPU_OMP_THREADS_BIND"] == "0|1"
