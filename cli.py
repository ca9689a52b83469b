"""The command `baton`: the table of its subcommands. Each is a module that reads its own options.

A subcommand is imported when it runs, so that `baton proxy` loads no torch and `baton --help` loads nothing.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from baton import __version__


@dataclass(frozen=True, slots=True)
class Subcommand:
    """A module that runs as `python -m`, and what it does in a line."""

    module: str
    help: str


SUBCOMMANDS = {
    "serve": Subcommand("baton.launch.serve", "serve a model on this machine: all processes below, as children"),
    "proxy": Subcommand("baton.proxy", "the HTTP API and the scheduler of a cluster"),
    "prefill": Subcommand("baton.prefill", "a prefill worker"),
    "decode": Subcommand("baton.decode", "a decode worker"),
    "stage": Subcommand("baton.worker.stages.remote", "a stage of a prefill worker on another host"),
    "store": Subcommand("baton.kvtransfer", "the KV store of a host"),
    "ray": Subcommand("baton.launch.ray", "serve a model on a Ray cluster"),
    "secret": Subcommand("baton.launch.secret", "make the secret that the nodes of a cluster share"),
    "batch": Subcommand("baton.offline.batch_command", "answer a file of requests"),
    "bench": Subcommand("baton.benchmark", "benchmarks: of a server, of Baton on this machine, of its parts"),
    "simulate": Subcommand("baton.simulator", "the whole system on a simulated clock"),
}


def usage() -> str:
    lines = [f"  {name:9} {command.help}" for name, command in SUBCOMMANDS.items()]
    return "\n".join(
        [
            "usage: baton COMMAND [options]; baton COMMAND --help lists the options of one; baton --version\n",
            *lines,
            "\nTo begin: baton serve (the demo model), or baton serve MODEL (a folder, or a hub id org/name)",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; the exit status. Without `argv`, the arguments of this process."""
    name, *arguments = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if name in ("-h", "--help", "-V", "--version"):
        print(usage() if name in ("-h", "--help") else f"baton {__version__}")
        return 0
    if name not in SUBCOMMANDS:
        problem = f"there is no command {name!r}" if name else "a command is needed"
        print(f"baton: error: {problem}: one of {', '.join(SUBCOMMANDS)} (see --help)", file=sys.stderr)
        return 2
    end_at_sigterm()
    sys.argv = [f"baton {name}", *arguments]
    try:
        runpy.run_module(SUBCOMMANDS[name].module, run_name="__main__", alter_sys=False)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            raise
        return int(ended.code or 0)
    return 0


def end_at_sigterm() -> None:
    """Let SIGTERM end this process until a node handles it, also as process 1 of a container: the kernel drops signals
    that such a process has no handler for, so a node that is stopped while it loads a model would not end."""
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
