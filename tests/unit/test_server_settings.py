"""Servers that are described in a way that cannot work are refused before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from sdpg_megatron.config import SGLangConfig
from sdpg_megatron.config.load import parse
from sdpg_megatron.config.server_checks import OWNED_ARGUMENTS, SAMPLING_ARGUMENTS, is_host, server_faults
from sdpg_megatron.errors import ConfigError

TREE: dict[str, Any] = {"run_dir": "x", "steps": 20, "model": {"path": "x"}, "data": {"train": ["x"]}}


def check_server_settings(sglang: SGLangConfig) -> None:
    for fault in server_faults(sglang):
        raise fault


@pytest.mark.parametrize(
    "changes",
    [
        {"urls": ("http://10.0.0.2:30000", "https://server-1.example.org:443/", "http://[fd00::2]:30000", "http://s")},
        {"urls": ("http://10.0.0.2:30000",), "router": "http://router_1:3000", "address": "10.0.0.1"},
        {"host": "::", "address": "fe80::1%eth0", "ports": (65535,)},
        {"arguments": ("--attention-backend", "triton", "--max-total-tokens=20000", "--ep", "2", "-1", "--")},
    ],
)
def test_what_can_work_passes(changes: dict[str, Any]) -> None:
    check_server_settings(SGLangConfig(**changes))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("10.0.0.2:30000", "begins with http:// or https://"),
        ("server:30000", "begins with http:// or https://"),
        ("http:/10.0.0.2:30000", "begins with http:// or https://"),
        ("tcp://10.0.0.2:30000", "begins with http:// or https://"),
        ("", "begins with http:// or https://"),
        ("http://", "host name or an IP address"),
        ("http://:30000", "host name or an IP address"),
        ("http://10.0.0.256:30000", "host name or an IP address"),
        ("http://a server:30000", "host name or an IP address"),
        ("http://10.0.0.2:port", "a URL \\(Port could not"),
        ("http://10.0.0.2:70000", "a URL \\(Port out of range"),
        ("http://10.0.0.2:0", "a port from 1 to 65535"),
        ("http://10.0.0.2:", "a port from 1 to 65535"),
        ("http://fd00::2:30000", "a URL"),
        ("http://10.0.0.2:30000/v1", "without a path or query"),
        ("http://10.0.0.2:30000?x=1", "without a path or query"),
        ("http://10.0.0.2:30000#x", "without a path or query"),
    ],
)
@pytest.mark.parametrize("field", ["urls", "router"])
def test_a_url_that_cannot_work_is_refused(field: str, url: str, message: str) -> None:
    changes: dict[str, Any] = {"urls": (url,)} if field == "urls" else {"router": url, "urls": ("http://s:1",)}
    with pytest.raises(ConfigError, match=rf"^rollout\.sglang\.{field}: found '.*{message}.*http://10\.0\.0\.2:30000"):
        check_server_settings(SGLangConfig(**changes))


@pytest.mark.parametrize(
    ("scheme", "message"),
    [("http://", "expected a URL without credentials.*api_key_variable"), ("", "begins with http")],
)
def test_credentials_in_a_url_are_refused_and_not_shown(scheme: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"found '\*\*\*@10\.0\.0\.2:30000', .*{message}") as caught:
        check_server_settings(SGLangConfig(urls=(f"{scheme}user:s3cret@10.0.0.2:30000",)))
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"urls": ("http://a:1", "http://a:1/")}, "urls: found 'http://a:1', expected each server once"),
        ({"host": "http://10.0.0.2"}, "host: found 'http://10.0.0.2', expected a host name or an IP address"),
        ({"address": "10.0.0.2:30000"}, "address: found '10.0.0.2:30000', expected a host name"),
        ({"address": ""}, "address: found '', expected a host name"),
        ({"arguments": ("--api-key=s3cret",)}, "arguments: found '--api-key', .*rollout.sglang.api_key_variable"),
        ({"arguments": ("--api-k", "s3cret")}, "arguments: found '--api-k \\(--api-key\\)', .*api_key_variable"),
        ({"arguments": ("--api-key s3cret",)}, "arguments: found '--api-key', .*rollout.sglang.api_key_variable"),
        ({"arguments": ("--tp", "2")}, "arguments: found '--tp \\(--tp-size\\)', .*rollout.sglang.tensor"),
        ({"arguments": ("--dp=2",)}, "arguments: found '--dp \\(--dp-size\\)', .*rollout.sglang.data"),
        ({"arguments": ("--config", "s3cret.yaml")}, "arguments: found '--config', .*rollout.sglang.arguments"),
        ({"arguments": ("--port", "1")}, "arguments: found '--port', .*rollout.sglang.ports"),
    ],
)
def test_addresses_ports_and_arguments_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^rollout\.sglang\.{message}") as caught:
        check_server_settings(SGLangConfig(**changes))
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("name", SAMPLING_ARGUMENTS)
def test_arguments_that_change_the_sampling_are_refused(name: str) -> None:
    for spelled in (name, f"{name}=1", name.replace("-", "_").replace("__", "--", 1)):
        with pytest.raises(ConfigError, match=rf"^rollout\.sglang\.arguments: found '{name}'.*of the model"):
            check_server_settings(SGLangConfig(arguments=("--log-level", "error", spelled, "1")))
    assert name not in OWNED_ARGUMENTS
    with pytest.raises(ConfigError, match=r"^rollout\.sglang\.arguments: found .*the model.s distribution"):
        check_server_settings(SGLangConfig(arguments=(name[:-3],)))


@pytest.mark.parametrize("top_p", [0.9, 0.0, 1.5])
def test_training_takes_no_truncated_samples(top_p: float) -> None:
    assert parse({**TREE, "rollout": {"top_p": 1.0}, "eval": {"top_p": 0.9}}).eval.top_p == 0.9
    with pytest.raises(ConfigError, match=rf"^rollout\.top_p: found {top_p}, expected 1: .*truncated.*eval\.top_p"):
        parse({**TREE, "rollout": {"top_p": top_p}})


def test_what_a_host_is() -> None:
    assert all(map(is_host, ("localhost", "a-b.c_d.e", "10.0.0.1", "::1", "fe80::1%eth0", "host.")))
    assert not any(map(is_host, ("", "a b", "10.0.0.999", "-a", "a..b", "a/b", "a:1", "x" * 64)))
