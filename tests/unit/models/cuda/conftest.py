"""Kernels run in Triton's interpreter here too, where there is no GPU: with its bfloat16 mended, as in unit/kernels."""

from __future__ import annotations

import importlib.util

import torch

if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    from baton.tests.unit.kernels.interpreter_bf16 import install

    install()
