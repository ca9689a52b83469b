"""Times the start of a decode worker on the GPU at hand, from the process's start until its steps are ready.

    PYTHONPATH=.link python scripts/bench_start.py [--shape llama-3.1-8b]

Random weights; with Triton's cache on disk empty and full, and kernels compiled ahead in processes or, as they are
launched, one after the other. Each start is a process of its own; one JSON line each, their logs on standard error.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from unittest.mock import patch

import torch

from baton.benchmark.gpu.gpu import SHAPES, line
from baton.decode.settings import DecodeSettings
from baton.models.cuda.queue import CudaQueue
from baton.node.telemetry import configure_logging
from baton.worker.build_cuda import load_on_cuda

READY = "ready"
TIMEOUT_S = 300


def start(shape: str, ahead: bool) -> None:
    """In a process of its own. Leaves at once: what is timed ends here."""
    configure_logging("info", f"{shape} ahead={ahead}")
    with nullcontext() if ahead else patch.object(CudaQueue, "rehearse"):
        load_on_cuda(DecodeSettings(load_format="dummy").for_device("cuda"), "decode", SHAPES / shape)
    torch.cuda.synchronize()
    print(READY, torch.cuda.get_device_name(), flush=True)
    os._exit(0)


def seconds_to_ready(shape: str, ahead: bool, cache: str) -> tuple[float, str]:
    """And the GPU's name."""
    code = f"from baton.benchmark.gpu.start import start; start({shape!r}, {ahead})"
    began_at = time.perf_counter()
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_CACHE_DIR": cache},
        stdout=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    took_s = time.perf_counter() - began_at
    ready, _, gpu = ran.stdout.strip().rpartition("\n")[2].partition(" ")
    assert ready == READY, ran.stdout
    return took_s, gpu


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", default="llama-3.1-8b", help="a folder of benchmark/shapes")
    parser.add_argument("--repeat", type=int, default=1, help="starts of each kind")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:  # not counted: it brings the libraries into memory, and fills a cache
        seconds_to_ready(options.shape, True, cache)
        for _ in range(options.repeat):
            for ahead in (False, True):
                with tempfile.TemporaryDirectory() as empty:
                    for name, folder in (("empty", empty), ("full", cache)):
                        took_s, gpu = seconds_to_ready(options.shape, ahead, folder)
                        line(
                            what="start",
                            shape=options.shape,
                            gpu=gpu,
                            cores=len(os.sched_getaffinity(0)),
                            ahead=ahead,
                            cache=name,
                            seconds=round(took_s, 1),
                        )


if __name__ == "__main__":
    main()
