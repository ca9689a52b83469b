"""Whether kernels are compiled ahead, in how many processes, and that nothing depends on it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels.triton import compiling as inside
from baton.models.cuda import compiling
from baton.models.cuda.compiling import compile_ahead, processes_for


@pytest.mark.parametrize(
    ("num_kernels", "cores", "processes"), [(80, 16, 8), (80, 64, 8), (80, 8, 4), (80, 2, 0), (9, 16, 2), (3, 16, 0)]
)
def test_processes_leave_cores_to_others_and_have_enough_to_do(num_kernels, cores, processes):
    """Guards against processes that start for nothing, and against more of them than cores."""
    assert processes_for(num_kernels, cores) == processes


def started(monkeypatch, caplog, *, found: list, absent: list) -> tuple[list[tuple], str]:
    """What compile_ahead asks of processes on a machine of 16 cores, and what it logs."""
    calls: list[tuple] = []
    monkeypatch.setattr(inside, "launched_by", lambda run: run() or found)
    monkeypatch.setattr(inside, "missing", lambda kernels: [each for each in kernels if each in absent])
    monkeypatch.setattr(inside, "compile_all", lambda *call: calls.append(call))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16), raising=False)
    with caplog.at_level(logging.INFO):
        compile_ahead(lambda: None)
    return calls, caplog.text


def test_a_full_cache_starts_no_process(monkeypatch, caplog):
    """Guards the usual start, which has nothing to compile, against waiting for processes."""
    calls, log = started(monkeypatch, caplog, found=list(range(40)), absent=[])
    assert calls == [] and "steps_rehearsed kernels=40 missing=0" in log


def test_an_empty_cache_is_filled_by_processes(monkeypatch, caplog):
    """Guards the log line: how many kernels, how many of them failed, by how many processes."""
    calls, log = started(monkeypatch, caplog, found=list(range(40)), absent=list(range(32)))
    assert calls == [(list(range(40)), 8, compiling.TIMEOUT_S)]
    assert "kernels_compiled kernels=32 failed=32 processes=8" in log


def test_another_triton_costs_the_time_and_no_more(monkeypatch, caplog):
    """Guards every GPU worker against a name that a later Triton has not: it is imported where that does no harm."""
    monkeypatch.setitem(sys.modules, "baton.kernels.triton.compiling", None)
    compile_ahead(lambda: None)
    assert "kernels_not_compiled_ahead" in caplog.text


def test_what_fails_is_logged_and_no_more(caplog):
    """Guards a start against a Triton whose inside is another one."""

    def fail() -> None:
        raise AttributeError("no such hook")

    compile_ahead(fail)
    assert "kernels_not_compiled_ahead" in caplog.text and "no such hook" in caplog.text


LAYERS = 8
MODELS = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}),
    "qwen3": ("qwen3", {}),
}


@pytest.mark.timeout(1800)  # a process that imports torch and triton, on a machine that may be busy
def test_a_rehearsal_forgets_no_kernel_and_is_short(make_model, tmp_path_factory):
    """Guards against kernels of layers or steps that are not rehearsed, and a rehearsal as long as what it is for."""
    folders = tmp_path_factory.mktemp("models")
    for model, (family, config) in MODELS.items():
        made = make_model(family, num_hidden_layers=LAYERS, hidden_size=64, vocab_size=144, **config)
        shutil.copytree(made.folder, folders / model)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("rehearse_sm90.py"))]
    result = subprocess.run(
        [*command, *(str(folders / model) for model in MODELS)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for model, found in zip(MODELS, map(json.loads, result.stdout.splitlines()), strict=True):
        assert found["forgotten"] == [] and found["kernels"] > 40, (model, found)
        assert found["rehearsal"] < 0.6 * found["start"], (model, found)
