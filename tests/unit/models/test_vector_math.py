"""No function of oneMKL's vector math is first called with many numbers, by whatever a process computes first."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from baton.models import vector_math
from baton.models.batch import Draw, Row
from baton.models.cpu.runner import ModelRunner
from baton.models.rope import inverse_frequencies
from baton.models.rope_config import RopeConfig
from baton.node.messages.control import SamplingSpec

OF_VECTOR_MATH = {
    *("acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "expm1", "lgamma", "log", "log10", "log1p"),
    *("log2", "sin", "sqrt", "tan", "tanh", "trunc"),
}
"""Functions that torch hands to oneMKL (aten/src/ATen/cpu/vml.h)."""


class FirstCalls(TorchDispatchMode):
    """Of each of these functions and each type of numbers the size of the first tensor that it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[tuple[str, torch.dtype], int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.rstrip("_")
        if name in OF_VECTOR_MATH:
            self.sizes.setdefault((name, args[0].dtype), args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device_step", [False, True], ids=["cpu", "gpu"])
def test_first_call_has_one_number(make_model, sequences, device_step):
    """Guards against a table, or a draw, of which a thread has computed its part by the wrong code: a worker answered
    with other tokens than those beside it, in one start of dozens."""
    with FirstCalls() as calls:
        if device_step:
            decoder = pytest.importorskip("baton.models.cuda.decoder", reason="Triton is made for Linux only")
            decoder.rope_tables(RopeConfig("default", 10000.0, 64), 100, "cpu")
            called, dtype = {"cos", "sin"}, torch.float64
        else:
            runner = ModelRunner.load(make_model("gemma2", sliding_window=19).folder)
            sequences(runner, 1, 200, 16)
            draw = Draw(SamplingSpec(max_tokens=9, temperature=0.7, min_p=0.1, top_p=0.9, logprobs=1), (), 100, 0)
            runner.step([Row(list(range(100)), 0, range(7), draw)])
            called, dtype = {"cos", "sin", "tanh", "log", "log1p", "exp"}, torch.float32
    assert {name: calls.sizes.get((name, dtype)) for name in called} == dict.fromkeys(called, 1)
    assert set(calls.sizes.values()) == {1}, f"of {vector_math.__name__}: {calls.sizes}"


def test_tables_of_a_gpu_are_rounded_from_exact_numbers():
    """Guards against tokens that differ between workers on hosts with other CPUs, whose float32 cosines differ."""
    decoder = pytest.importorskip("baton.models.cuda.decoder", reason="Triton is made for Linux only")
    rope = RopeConfig("default", 10000.0, 64, attention_factor=1.5)
    tables, frequencies = decoder.rope_tables(rope, 2000, "cpu"), inverse_frequencies(rope)
    for position in (1, 412, 1999):
        angles = (position * frequencies).tolist()
        for table, function in ((tables.cos, math.cos), (tables.sin, math.sin)):
            assert table[position].tolist() == torch.tensor([1.5 * function(angle) for angle in angles]).tolist()
