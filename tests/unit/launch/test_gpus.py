"""Guards launch.gpus: the driver's list of GPUs, and the lines that show how workers share them."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

import pytest

from baton.launch.gpus import GIB, USABLE, Gpu, describe, load_driver, place, query, visible_gpus
from baton.node.errors import SettingsError

H200 = Gpu("NVIDIA H200", 140 * GIB)


class Driver:
    """A CUDA driver with these GPUs, as the calls of its C interface; `broken` is the number of one that has failed."""

    def __init__(self, gpus: list[Gpu], status: int = 0, broken: int = -1) -> None:
        self._gpus, self._status, self._broken = gpus, status, broken

    def cuInit(self, flags: int) -> int:
        return self._status

    def cuDeviceGetCount(self, count: Any) -> int:
        ctypes.cast(count, ctypes.POINTER(ctypes.c_int))[0] = len(self._gpus)
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:
        ctypes.cast(device, ctypes.POINTER(ctypes.c_int))[0] = number
        return 101 if number == self._broken else 0

    def cuDeviceTotalMem_v2(self, total_bytes: Any, device: ctypes.c_int) -> int:
        ctypes.cast(total_bytes, ctypes.POINTER(ctypes.c_size_t))[0] = self._gpus[device.value].total_bytes
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: ctypes.c_int) -> int:
        name.value = self._gpus[device.value].name.encode()
        return 0


def test_gpus_are_those_of_the_driver() -> None:
    """A number that differs from torch's would send a worker to a GPU that does not exist."""
    assert query(Driver([H200, Gpu("small", 8 * GIB)])) == [H200, Gpu("small", 8 * GIB)]
    assert query(Driver([])) == [] == query(Driver([H200], status=100)), "no device: a driver without a GPU"
    assert query(Driver([H200] * 3, broken=1)) == [H200]


def test_a_machine_without_driver_has_no_gpus() -> None:
    """A traceback instead of a CPU."""
    if load_driver() is None:
        assert visible_gpus(os.environ) == []
    assert visible_gpus({"PYTHONPATH": "/nowhere", "PYTHONHOME": "/nowhere"}) == [], f"{sys.executable} cannot start"


def test_the_share_of_each_worker_is_printed() -> None:
    """Users must see why a worker has less KV than the card has room for."""
    workers = place({"prefill-0": 1, "decode-0": 1, "decode-1": 1}, [0, 1])
    assert describe(workers, [H200], sized_by_user=False) == [
        "GPU 0 (NVIDIA H200, 140.0 GiB): prefill-0 up to 63.0 GiB (45 %), decode-1 up to 63.0 GiB (45 %)",
        "GPU 1: decode-0 up to 90 %",
    ]
    assert describe(place({"decode-0": 1}, [0]), [H200], sized_by_user=True) == [
        "GPU 0 (NVIDIA H200, 140.0 GiB): decode-0; memory as in the arguments of the workers"
    ]


def test_ranks_take_gpus_that_follow_one_another():
    """Guards against ranks of two workers that share a GPU while another is free, and a worker that is given one GPU of
    several that it will use."""
    placed = place({"prefill-0": 2, "decode-0": 1, "decode-1": 2}, [0, 1, 2, 3])
    assert [list(placed[name].gpus) for name in placed] == [[0, 1], [2], [0, 1]]
    assert place({"prefill-0": 1, "decode-0": 1}, [0], usable=0.5)["decode-0"].share == 0.25
    assert placed["decode-0"].share == USABLE and placed["prefill-0"].share == placed["decode-1"].share == USABLE / 2
    with pytest.raises(SettingsError, match="follow one another"):
        place({"decode-0": 2}, [0, 2])
    with pytest.raises(SettingsError, match="needs 4 GPUs"):
        place({"decode-0": 4}, [0, 1])
