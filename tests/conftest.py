"""What all tests share: bounded threads, cheap garbage collections, and the marker of tests that need a GPU."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Generator

import pytest
from hypothesis import settings

HAS_GPU = shutil.which("nvidia-smi") is not None

if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any test imports one

# A loaded CI machine is slow by accident, and time is never asserted; a failure prints how to repeat it.
settings.register_profile("baton", deadline=None, print_blob=True)
settings.load_profile("baton")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Stop the garbage collector while tests are imported, then exclude what they have imported from collections: it is
    a million objects, and looking through them again and again was an eighth of the CPU time of tests."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` on a machine without an NVIDIA driver."""
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))
