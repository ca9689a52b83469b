"""The options that every benchmark of a whole cluster has."""

from __future__ import annotations

import argparse
from pathlib import Path

from baton.benchmark.cluster.model import shape_names


def new_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """`description`: a module's docstring, whose first line is shown."""
    parser = argparse.ArgumentParser(prog=prog, description=description.split("\n")[0])
    add = parser.add_argument
    add("--shape", default="llama-3.1-8b", choices=shape_names(), help="model: one of benchmark/shapes")
    add("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: the demo model")
    add("--worker-arg", action="append", default=[], help="passed on to each worker")
    add("--start-timeout-s", type=float, default=180.0, help="from start to the first token")
    add("--output", type=Path, help="file that the lines are added to")
    return parser
