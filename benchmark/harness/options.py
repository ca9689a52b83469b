"""The command lines of benchmarks: the options that all have, and those of every benchmark of a whole cluster."""

from __future__ import annotations

import argparse
from pathlib import Path

from baton.benchmark.harness.shapes import shape_names


def bare_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with a module's docstring. `name` is the benchmark's in `baton bench`."""
    return argparse.ArgumentParser(
        prog=f"baton bench {name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def new_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    parser = bare_parser(name, doc)
    parser.add_argument("--output", type=Path, help="append the JSON lines to this file as well")
    return parser


def cluster_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    parser = new_parser(name, doc)
    add = parser.add_argument
    add("--shape", default="llama-3.1-8b", choices=shape_names(), help="model: one of benchmark/shapes")
    add("--layers", type=int, help="so many layers of the shape; default: all")
    add("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: the demo model")
    add("--worker-arg", action="append", default=[], help="passed on to each worker")
    add("--start-timeout-s", type=float, default=180.0, help="limit from start to the first token")
    return parser
