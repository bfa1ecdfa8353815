"""Checks of `rollout.sglang`, without network access or files."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from urllib.parse import urlsplit

from sdpg_megatron.config import SGLangConfig
from sdpg_megatron.config.external import is_external
from sdpg_megatron.errors import ConfigError, did_you_mean

TRANSPORTS = ("broadcast", "shared", "disk")
"""Transports of this package."""

SAMPLING_ARGUMENTS = (
    "--preferred-sampling-params", "--sampling-defaults", "--enable-deterministic-inference", "--enable-watermark",
    "--speculative-accept-threshold-single", "--speculative-accept-threshold-acc",
)  # fmt: skip
"""Arguments of sglang.launch_server (0.5.23) that change sampling or the defaults of requests."""
OWNED_ARGUMENTS: Mapping[str, str] = {
    "--host": "rollout.sglang.host",
    "--port": "rollout.sglang.ports",
    "--model-path": "model.path",
    "--model": "model.path",
    "--tp-size": "rollout.sglang.tensor",
    "--tensor-parallel-size": "rollout.sglang.tensor",
    "--dp-size": "rollout.sglang.data",
    "--data-parallel-size": "rollout.sglang.data",
    "--dtype": "rollout.sglang.dtype",
    "--base-gpu-id": "rollout.sglang.first_gpu",
    "--random-seed": "seed",
    "--api-key": "rollout.sglang.api_key_variable",
    "--admin-api-key": "rollout.sglang.admin_key_variable",
    "--config": "the arguments of that file in rollout.sglang.arguments",
}
"""Arguments set by the launcher, with the configuration field of each; and --config, which could set any of them."""
HOST_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
URL_FIX = "write scheme, host and port, for example http://10.0.0.2:30000"


def server_faults(sglang: SGLangConfig) -> Iterator[ConfigError]:
    """Errors of single fields and of combinations."""
    yield from _address_faults(sglang)
    yield from _argument_faults(sglang.arguments)
    yield from _combination_faults(sglang)


def _address_faults(sglang: SGLangConfig) -> Iterator[ConfigError]:
    for url in sglang.urls:
        yield from _url_faults("rollout.sglang.urls", url)
    bases = [url.rstrip("/") for url in sglang.urls]
    if repeated := [url for url in bases if bases.count(url) > 1]:
        yield ConfigError("rollout.sglang.urls", repeated[0], "each server once", "remove the repetition")
    if sglang.router is not None:
        yield from _url_faults("rollout.sglang.router", sglang.router)
    for name, host in (("host", sglang.host), ("address", sglang.address)):
        if host is not None and not is_host(host):
            fix = "write the host alone, without scheme and port, for example 10.0.0.2"
            yield ConfigError(f"rollout.sglang.{name}", host, "a host name or an IP address", fix)


def _url_faults(field: str, url: str) -> Iterator[ConfigError]:
    """Check scheme, host and optional port of a URL; at most one error."""
    shown = f"***@{url.rpartition('@')[2]}" if "@" in url else url
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:  # a port that is no number or too large, brackets without an IPv6 address
        yield ConfigError(field, shown, f"a URL ({error})", URL_FIX)
        return
    if parts.scheme not in ("http", "https") or "://" not in url:
        yield ConfigError(field, shown, "a URL that begins with http:// or https://", URL_FIX)
    elif parts.username is not None or parts.password is not None:
        fix = "remove them; name the key's environment variable in rollout.sglang.api_key_variable"
        yield ConfigError(field, shown, "a URL without credentials", fix)
    elif not parts.hostname or not is_host(parts.hostname):
        yield ConfigError(field, shown, "a URL with a host name or an IP address", URL_FIX)
    elif port == 0 or parts.netloc.endswith(":"):
        yield ConfigError(field, shown, "a port from 1 to 65535", URL_FIX)
    elif parts.path not in ("", "/") or parts.query or parts.fragment:
        fix = f"{URL_FIX}; endpoints such as /generate are added to it"
        yield ConfigError(field, shown, "a URL without a path or query", fix)


def is_host(text: str) -> bool:
    """True if `text` is an IP address or a syntactically valid host name. Nothing is resolved."""
    try:
        ipaddress.ip_address(text.partition("%")[0])
        return True
    except ValueError:
        labels = text.removesuffix(".").split(".")
        # Four numbers that are not an address are not a host name either.
        return all(map(HOST_LABEL.fullmatch, labels)) and not labels[-1].isdigit()


def _argument_faults(arguments: Sequence[str]) -> Iterator[ConfigError]:
    for argument in arguments:
        name = re.split(r"[=\s]", argument, maxsplit=1)[0].replace("_", "-")
        if len(name) < 3 or not name.startswith("--"):
            continue
        if match := _match(name, SAMPLING_ARGUMENTS):
            expected = "no argument that changes sampling: training needs samples of the model's distribution"
            fix = "remove it; eval.temperature and eval.top_p are for evaluations"
            yield ConfigError("rollout.sglang.arguments", _shown(name, match), expected, fix)
        elif match := _match(name, OWNED_ARGUMENTS):
            expected = "no argument that a field of the configuration sets"
            fix = f"remove it; set {OWNED_ARGUMENTS[match]}"
            yield ConfigError("rollout.sglang.arguments", _shown(name, match), expected, fix)


def _match(name: str, listed: Iterable[str]) -> str | None:
    """Argument that a name equals or abbreviates: SGLang's parser accepts every unambiguous prefix."""
    return name if name in listed else next((full for full in listed if full.startswith(name)), None)


def _shown(name: str, match: str) -> str:
    return name if name == match else f"{name} ({match})"


def _combination_faults(sglang: SGLangConfig) -> Iterator[ConfigError]:
    if sglang.transport not in TRANSPORTS and not is_external(sglang.transport):
        expected = f"{', '.join(map(repr, TRANSPORTS))}, or package.module:Class"
        fix = did_you_mean(sglang.transport, TRANSPORTS) or "choose one of these"
        yield ConfigError("rollout.sglang.transport", sglang.transport, expected, fix)
    if sglang.router and not (sglang.urls or sglang.ports):
        fix = "name the servers in rollout.sglang.urls, or the ports of started servers in rollout.sglang.ports"
        yield ConfigError("rollout.sglang.router", sglang.router, "null where servers choose their own ports", fix)
    if sglang.colocated and sglang.urls:
        fix = "have the run start its servers, or set it to false"
        yield ConfigError("rollout.sglang.colocated", True, "false where rollout.sglang.urls names servers", fix)
    if sglang.colocated and sglang.transport == "broadcast":
        # NCCL does not support two ranks of a group on one device.
        yield ConfigError(
            "rollout.sglang.transport", "broadcast", "shared or disk with colocated servers", "use shared"
        )
    if sglang.ports and (len(sglang.ports) != sglang.servers or len(set(sglang.ports)) != sglang.servers):
        expected = f"{sglang.servers} different ones, one for each server"
        yield ConfigError("rollout.sglang.ports", sglang.ports, expected, "name all or none")
    if sglang.transport in TRANSPORTS and sglang.transport != "disk" and sglang.data > 1 and not sglang.urls:
        yield ConfigError(
            "rollout.sglang.transport",
            sglang.transport,
            "disk where rollout.sglang.data is above 1: other transports cannot address the replicas of a server",
            "use several servers, or the disk transport",
        )
