"""Kernels run in Triton's interpreter here too, where there is no GPU: with its bfloat16 mended, as in unit/kernels."""

from __future__ import annotations

import importlib.util

import torch

if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    from baton.tests.unit.kernels import interpreter_bf16, interpreter_speed

    interpreter_bf16.install()
    interpreter_speed.install()
