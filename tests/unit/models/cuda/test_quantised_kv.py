"""The GPU's runner over KV of 8-bit floats, its kernels interpreted, against the CPU's."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.models.batch import Draw, Row
from baton.node.messages.control import SamplingSpec
from baton.tests.unit.kernels.interpreter_bf16 import install
from baton.tests.unit.models.cuda.test_runner import make

if not torch.cuda.is_available():
    install()  # the interpreter rounds to 8-bit floats wrongly


def test_logits_equal_the_cpu_s(make_model):
    """Guards the scales' way through the runner. Where the two round a number to different steps, logits differ."""
    late, plain = make(make_model("qwen3", num_hidden_layers=2).folder, kv_dtype="fp8")
    draw = Draw(SamplingSpec(max_tokens=9, temperature=0.0), (), 0, 0)
    first = [Row(list(range(3, 25)), 0, [5, 2, 9], None), Row([7, 8, 9], 0, [1], draw)]
    then = [Row(list(range(40, 60)), 22, [5, 2, 9], draw)]
    for rows in (first, then):
        expected = plain.compute(rows)[1]
        assert (late.logits(rows) - expected).norm() < 0.02 * expected.norm()
