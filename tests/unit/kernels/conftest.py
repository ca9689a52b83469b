"""Where there is no GPU, Triton kernels run in its interpreter (tests/conftest.py), whose bfloat16 is mended here."""

from __future__ import annotations

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    from baton.tests.unit.kernels import interpreter_bf16, interpreter_speed

    interpreter_bf16.install()
    interpreter_speed.install()


@pytest.fixture
def device() -> str:
    """Where the checks of Triton kernels run; skips where there is no Triton."""
    pytest.importorskip("triton", reason="Triton is made for Linux only")
    return "cuda" if torch.cuda.is_available() else "cpu"
