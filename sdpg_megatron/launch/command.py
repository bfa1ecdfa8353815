"""The command line of a machine's launcher."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sdpg_megatron.errors import SdpgError
from sdpg_megatron.launch.machine import Machine, NodeConfig, run
from sdpg_megatron.process import streams


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: see `Machine.run`."""
    parser = argparse.ArgumentParser(prog="launch.sh", description="One machine's part of a training run.")
    parser.add_argument("--nodes", type=int, required=True, help="machines of the run")
    parser.add_argument("--node", type=int, required=True, help="this one's number, from 0")
    parser.add_argument("--ranks", type=int, required=True, help="ranks of the trainer on this machine")
    parser.add_argument("--servers", type=int, required=True, help="rollout servers on this machine")
    parser.add_argument("--address", required=True, help="of machine 0, as the others reach it")
    parser.add_argument("--port", type=int, required=True, help="there; the one after it is used, too; 0 for any")
    parser.add_argument("--meet-seconds", type=float, required=True, help="until all machines are there")
    parser.add_argument("--lost-seconds", type=float, required=True, help="of silence after which one is lost")
    parser.add_argument("--code-file", type=Path, help="where machine 0 leaves its exit code")
    parser.add_argument("--branch-from", metavar="RUN[@STEP]", help="as of sdpg-megatron train")
    parser.add_argument("--new-reference", action="store_true", help="as of sdpg-megatron train")
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
    node_config = NodeConfig(
        nodes=options.nodes,
        node=options.node,
        ranks=options.ranks,
        servers=options.servers,
        address=options.address,
        port=options.port,
        meet_seconds=options.meet_seconds,
        lost_seconds=options.lost_seconds,
    )
    branch = ["--branch-from", options.branch_from] if options.branch_from is not None else []
    branch += ["--new-reference"] if options.new_reference else []
    return run(Machine(node_config, options.config, options.overrides, branch))
