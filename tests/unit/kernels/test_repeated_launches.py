"""Launches that are repeated with another layer are those that Triton makes by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels.triton.launch import Launch

TIMEOUT_S = 1800
"""Triton compiles in a process; a busy machine may take long."""


@pytest.mark.timeout(TIMEOUT_S)
def test_repeated_launches_are_those_of_triton_alone(tmp_path):
    """Guards against a kernel that is specialised for what changes: for a layer, or for how its tensors are aligned."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DISABLE_LINE_INFO": "1"}
    command = [sys.executable, str(Path(__file__).with_name("repeated_launches.py"))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    cases = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(cases) >= 7
    for case in cases:
        assert case["same"], case
        assert case["lookups"] < case["launches"], case  # else nothing was repeated


class RecordingKernel:
    """Launches nothing, and says so as Triton's interpreter does."""

    arg_names = ("x_ptr", "layer", "SIZE")

    def __init__(self) -> None:
        self.launched: list[tuple] = []

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *arguments, **options: self.launched.append((grid, *arguments, options))


def test_what_has_not_changed_is_as_before():
    """Guards against arguments that get into another's place, as constants are given by name."""
    kernel, x = RecordingKernel(), torch.zeros(4)
    launch = Launch(kernel, (2,), x, 0, SIZE=4, num_warps=1)
    launch(layer=5)
    launch(layer=7)
    assert kernel.launched == [((2, 1, 1), x, layer, 4, {"num_warps": 1}) for layer in (5, 7)]


def test_a_launch_over_another_grid_stays_over_it():
    kernel, x = RecordingKernel(), torch.zeros(4)
    launch = Launch(kernel, (2,), x, 0, SIZE=4)
    launch.over((3, 5))()
    launch(layer=1)
    assert kernel.launched == [((3, 5, 1), x, 0, 4, {}), ((3, 5, 1), x, 1, 4, {})]


@pytest.mark.parametrize("other", [torch.zeros(5), torch.zeros(4, dtype=torch.float64), torch.zeros(8)[::2]])
def test_a_tensor_unlike_the_one_before_is_refused(other):
    """Guards against a kernel that reads memory which is not the tensor's."""
    kernel = RecordingKernel()
    launch = Launch(kernel, (2,), torch.zeros(4), 0, SIZE=4)
    with pytest.raises(ValueError, match="unlike"):
        launch(x_ptr=other)
    assert not kernel.launched
