"""Times the start of a decode worker on the GPU at hand, from the process's start until its steps are ready.

Random weights; with Triton's cache on disk empty and full, and kernels compiled ahead in processes or one after the
other as they are launched. Each start is a process of its own; one JSON line each, their logs on standard error.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from unittest.mock import patch

import torch

from baton.benchmark.harness.json_lines import JsonLines
from baton.benchmark.harness.options import new_parser
from baton.benchmark.harness.processes import child_environment, program
from baton.benchmark.harness.shapes import SHAPES
from baton.decode.settings import DecodeSettings
from baton.models.cuda.queue import CudaQueue
from baton.node.telemetry import configure_logging
from baton.worker.build_cuda import load_on_cuda

READY = "ready"
TIMEOUT_S = 300
AHEAD, AS_LAUNCHED = "ahead", "as-launched"


def start_once(shape: str, compiling: str) -> None:
    """In a process of its own, which exits at once: what is timed ends here."""
    configure_logging("info", f"{shape} compiling={compiling}")
    with nullcontext() if compiling == AHEAD else patch.object(CudaQueue, "rehearse"):
        settings = DecodeSettings(load_format="dummy")
        load_on_cuda(settings, settings.worker_sizes("cuda"), "decode", SHAPES / shape)
    torch.cuda.synchronize()
    print(READY, torch.cuda.get_device_name(), flush=True)
    os._exit(0)


def seconds_to_ready(shape: str, compiling: str, cache: str) -> tuple[float, str]:
    """Seconds, and the GPU's name."""
    began_at = time.perf_counter()
    ran = subprocess.run(
        program("start", "--shape", shape, "--once", compiling),
        env=child_environment(TRITON_CACHE_DIR=cache),
        stdout=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    took_s = time.perf_counter() - began_at
    ready, _, gpu = ran.stdout.strip().rpartition("\n")[2].partition(" ")
    assert ready == READY, ran.stdout
    return took_s, gpu


def main(argv: Sequence[str]) -> int:
    parser = new_parser("start", __doc__)
    parser.add_argument("--shape", default="llama-3.1-8b", help="a folder of benchmark/shapes")
    parser.add_argument("--repeat", type=int, default=1, help="starts of each kind")
    parser.add_argument("--once", choices=(AHEAD, AS_LAUNCHED), help="start once in this process, compiling kernels so")
    options = parser.parse_args(argv)
    if options.once:
        start_once(options.shape, options.once)
    lines = JsonLines(options.output)
    with tempfile.TemporaryDirectory() as cache:  # not counted: reads the libraries from disk, and fills a cache
        seconds_to_ready(options.shape, AHEAD, cache)
        for _ in range(options.repeat):
            for compiling in (AS_LAUNCHED, AHEAD):
                with tempfile.TemporaryDirectory() as empty:
                    for name, folder in (("empty", empty), ("full", cache)):
                        took_s, gpu = seconds_to_ready(options.shape, compiling, folder)
                        lines.put(
                            "start",
                            shape=options.shape,
                            gpu=gpu,
                            cores=len(os.sched_getaffinity(0)),
                            ahead=compiling == AHEAD,
                            cache=name,
                            seconds=round(took_s, 1),
                        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
