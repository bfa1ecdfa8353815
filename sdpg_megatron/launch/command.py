"""Command line of a machine's launcher."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from sdpg_megatron.errors import SdpgError
from sdpg_megatron.launch.machine import Machine, NodeConfig
from sdpg_megatron.process import streams


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the launcher; returns its exit code, see `Machine.run`."""
    parser = argparse.ArgumentParser(prog="launch.sh", description="Launch one machine's part of a training run.")
    parser.add_argument("--nodes", type=int, required=True, help="number of machines")
    parser.add_argument("--node", type=int, required=True, help="number of this machine, from 0")
    parser.add_argument("--ranks", type=int, required=True, help="trainer ranks on this machine")
    parser.add_argument("--servers", type=int, required=True, help="rollout servers on this machine")
    parser.add_argument("--address", required=True, help="address of machine 0, as the others reach it")
    parser.add_argument("--port", type=int, required=True, help="port on machine 0; port + 1 is used too; 0 for any")
    parser.add_argument("--meet-seconds", type=float, required=True, help="bound of the rendezvous of all machines")
    parser.add_argument("--lost-seconds", type=float, required=True, help="silence after which a machine is lost")
    parser.add_argument("--code-file", type=Path, help="file for the exit code of machine 0")
    parser.add_argument("--branch-from", metavar="RUN[@STEP]", help="as in sdpg-megatron train")
    parser.add_argument("--new-reference", action="store_true", help="as in sdpg-megatron train")
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    with streams.guarded():
        streams.keep_going()
        try:
            code = _run(options)
        except SdpgError as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            code = 2
    if options.code_file and options.node == 0:
        options.code_file.write_text(f"{code}\n", encoding="ascii")
    return code


def _run(options: argparse.Namespace) -> int:
    node_config = NodeConfig(**{field.name: getattr(options, field.name) for field in fields(NodeConfig)})
    branch = ["--branch-from", options.branch_from] if options.branch_from is not None else []
    branch += ["--new-reference"] if options.new_reference else []
    return asyncio.run(Machine(node_config, options.config, options.overrides, branch).run())
