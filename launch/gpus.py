"""The GPUs that this machine's workers can use, and how the workers share them.

It asks the CUDA driver in a process of its own, so that the launcher needs no torch, initialises no CUDA, and outlives
a driver that hangs. The driver applies CUDA_VISIBLE_DEVICES, so the numbers are those that torch gives in a worker.
`place` is pure.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from baton.node.errors import SettingsError

GIB = 1 << 30
QUERY_TIMEOUT_S = 60.0
USABLE = 0.9
"""Share of a GPU that its workers may use together, unless another is asked for. The rest is for what no worker plans:
the contexts of CUDA in several processes, and buffers of libraries."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as the driver describes it."""

    name: str
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a worker runs: number of its first GPU, and the share of each GPU's memory that the worker may use."""

    gpu: int
    share: float
    ranks: int = 1
    """On so many GPUs from that one on."""

    @property
    def gpus(self) -> range:
        return range(self.gpu, self.gpu + self.ranks)


def place(workers: Mapping[str, int], gpus: Sequence[int], usable: float = USABLE) -> dict[str, Placement]:
    """Workers, of so many ranks or stages each, take `gpus` in turn, one each; those on one GPU get equal parts of the
    share `usable` of its memory. No GPUs: no placements. SettingsError if a worker has more ranks, or its GPUs do not
    follow one another."""
    if not gpus:
        return {}
    chosen: dict[str, Sequence[int]] = {}
    place = 0
    for worker, ranks in workers.items():
        if ranks > 1 and place % len(gpus) + ranks > len(gpus):
            place = 0  # from the first on, once more
        taken = [gpus[(place + rank) % len(gpus)] for rank in range(ranks)]
        if taken != list(range(taken[0], taken[0] + ranks)):
            known = " ".join(map(str, gpus))
            raise SettingsError(
                f"{worker}, by --tp and --pp: needs {ranks} GPUs whose numbers follow one another, of GPUs {known}"
            )
        chosen[worker], place = taken, place + ranks
    ranks_on = Counter(gpu for taken in chosen.values() for gpu in taken)
    return {
        worker: Placement(taken[0], min(int(usable / ranks_on[gpu] * 10_000) / 10_000 for gpu in taken), len(taken))
        for worker, taken in chosen.items()
    }


def describe(placements: Mapping[str, Placement], gpus: Sequence[Gpu], sized_by_user: bool) -> list[str]:
    """A line for each GPU in use, with the share of each of its workers."""
    lines = []
    for number in sorted({gpu for placement in placements.values() for gpu in placement.gpus}):
        known = gpus[number] if number < len(gpus) else None
        workers = {worker: placement for worker, placement in placements.items() if number in placement.gpus}
        parts = [_share(worker, placement.share, known, sized_by_user) for worker, placement in workers.items()]
        title = f"GPU {number} ({known.name}, {known.total_bytes / GIB:.1f} GiB)" if known else f"GPU {number}"
        lines.append(f"{title}: {', '.join(parts)}{'; memory as in the arguments of the workers' * sized_by_user}")
    return lines


def _share(worker: str, share: float, gpu: Gpu | None, sized_by_user: bool) -> str:
    if sized_by_user:
        return worker
    part = f"{100 * share:.4g} %"
    return f"{worker} up to {share * gpu.total_bytes / GIB:.1f} GiB ({part})" if gpu else f"{worker} up to {part}"


def visible_gpus(environ: Mapping[str, str]) -> list[Gpu]:
    """What a worker started with `environ` will see; empty without an NVIDIA driver, or if it does not answer."""
    if _torch_is_cpu_only():
        return []
    try:
        answer = subprocess.run(
            [sys.executable, "-P", "-m", "baton.launch.gpus"],
            env=environ,
            capture_output=True,
            text=True,
            timeout=QUERY_TIMEOUT_S,
            check=True,
        )
        return [Gpu(name, total_bytes) for name, total_bytes in json.loads(answer.stdout)]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def _torch_is_cpu_only() -> bool:
    """Whether the installed build of torch cannot use a GPU, as its version says."""
    try:
        return version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False


def query(driver: Any) -> list[Gpu]:
    """The GPUs of `driver`, the loaded library of CUDA; empty where it cannot start."""
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    gpus = []
    for number in range(count.value):
        device, total_bytes, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
        calls = (
            driver.cuDeviceGet(ctypes.byref(device), number),
            driver.cuDeviceTotalMem_v2(ctypes.byref(total_bytes), device),
            driver.cuDeviceGetName(name, len(name), device),
        )
        if any(calls):
            break  # later numbers would shift
        gpus.append(Gpu(name.value.decode(errors="replace"), total_bytes.value))
    return gpus


def load_driver() -> Any | None:
    """The CUDA driver's library; None where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


if __name__ == "__main__":
    found = load_driver()
    print(json.dumps([(gpu.name, gpu.total_bytes) for gpu in query(found)] if found is not None else []))
