"""Kernels compiled ahead in processes are those that launches look for, and a process that died delays nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is made for Linux only")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from baton.kernels.triton.compiling import Kernel, turns

pytestmark = pytest.mark.timeout(1800)  # Triton compiles in processes; a busy machine may take long
DEADLY = """
import os, pathlib, signal
try:
    pathlib.Path(__file__ + ".killed").touch(exist_ok=False)
    os.kill(os.getpid(), signal.SIGKILL)
except FileExistsError:
    from baton.kernels.triton.rope_write import _rope_write_kernel
"""


def run(folder: Path, *modules: str) -> dict:
    """compile_ahead.py with its cache, and modules, in `folder`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_DISABLE_LINE_INFO": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, str(Path(__file__).with_name("compile_ahead.py")), *modules]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def test_launches_find_what_processes_compiled(tmp_path):
    """Guards against a cache key that differs between the processes: everything would be compiled twice."""
    found = run(tmp_path)
    assert found["wanted"] == found["absent"] > 4 and found["still"] == 0
    assert found["hits"] == [True] * found["wanted"]


def test_a_process_that_dies_takes_no_kernel_along(tmp_path):
    """Guards against a start that fails, or waits, where compiling ahead could have been done without."""
    (tmp_path / "deadly.py").write_text(DEADLY)
    found = run(tmp_path, "deadly")
    assert (tmp_path / "deadly.py.killed").exists()
    assert found["wanted"] == found["absent"] > 2 and found["hits"] == [True] * found["wanted"]


class Gluon(ASTSource):
    """Stands for Gluon's source."""


def kernel(name: str, source_type: type[ASTSource] = ASTSource) -> Kernel:
    return Kernel("a", name, "", source_type.__new__(source_type), {}, GPUTarget("cuda", 90, 32))


def test_the_longest_come_first_and_kernels_of_one_function_apart():
    """Guards against one process that is still at work when the others are done."""
    assert turns([kernel("f"), kernel("f"), kernel("g"), kernel("h", Gluon)]) == [3, 0, 2, 1]
