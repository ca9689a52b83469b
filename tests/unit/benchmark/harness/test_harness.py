"""Guards what benchmarks share: lines that survive a cut, models that can be served, statistics, child processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from baton.benchmark.harness.json_lines import JsonLines, rounded
from baton.benchmark.harness.processes import MeasuringChild, busy_s, child_environment, cpu_s, peak_memory_mb
from baton.benchmark.harness.shapes import block_bytes, make_model, shape_names
from baton.benchmark.harness.statistics import median_text, percentile
from baton.models.config import ModelConfig
from baton.node.modelhub import DEMO_MODEL, locate_model


def test_a_line_is_in_the_file_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that is cut off would else lose what it had measured."""
    lines = JsonLines(tmp_path / "out")
    lines.put("cell", rate=2.0, spent={"a": [1 / 3, 2_000_000.4]}, of="x")
    wanted = {"what": "cell", "rate": 2.0, "spent": {"a": [0.33333, 2_000_000]}, "of": "x"}
    assert json.loads((tmp_path / "out").read_text()) == json.loads(capsys.readouterr().out) == wanted
    JsonLines(tmp_path / "out").put("more")
    assert len((tmp_path / "out").read_text().splitlines()) == 2


def test_rounding_leaves_other_values_alone() -> None:
    """Flags and counts are no measurements."""
    assert rounded({"a": True, "b": 1234567, "c": None}) == {"a": True, "b": 1234567, "c": None}


@pytest.mark.parametrize("shape", shape_names())
def test_a_made_model_can_be_served(shape: str, tmp_path: Path) -> None:
    """A vocabulary larger than the tokenizer's would draw tokens that are no text."""
    folder = make_model(shape, tmp_path / "model")
    config, demo = ModelConfig.from_folder(folder), ModelConfig.from_folder(locate_model(DEMO_MODEL))
    assert config.vocab_size == demo.vocab_size
    assert (folder / "tokenizer.json").is_file()
    rows = config.kv_planes * config.num_layers * config.num_kv_heads
    assert block_bytes(folder, 64, 2) == 2 * 64 * rows * config.head_dim


@pytest.mark.parametrize("shape", shape_names())
def test_a_model_of_few_layers_is_one_of_its_family(shape: str, tmp_path: Path) -> None:
    """A list with an entry a layer, or a number of first layers, must still fit."""
    config = ModelConfig.from_folder(make_model(shape, tmp_path / "model", layers=4))
    assert config.num_layers == 4 and (config.experts is None or any(config.experts.layers))


def test_sigterm_lets_a_benchmark_clean_up() -> None:
    """Killed without its `finally` blocks, a run would leave a cluster behind that holds the GPU."""
    code = (
        "import signal; from baton.benchmark.harness.json_lines import exit_on_sigterm; exit_on_sigterm()\n"
        "try:\n    print('on', flush=True); signal.pause()\nfinally:\n    print('stopped', flush=True)"
    )
    child = subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "on\n"
    child.terminate()
    assert child.communicate(timeout=60)[0] == "stopped\n" and child.returncode == 143


def test_percentiles_are_those_of_the_load_test() -> None:
    """Two definitions would make equal latencies differ between reports."""
    assert (percentile([1.0, 2.0, 3.0, 4.0], 50), percentile([5.0], 99)) == (2.5, 5.0)
    assert percentile([0.0, 10.0], 90) == pytest.approx(9.0)


def test_the_median_stands_with_its_range() -> None:
    """A ratio without its spread looks surer than it is."""
    assert median_text([3.0, 1.0, 2.0]) == "2.00 (1.00 .. 3.00)"


def test_a_measuring_child_that_ends_is_an_error() -> None:
    """A benchmark that waits for a dead process waits for ever."""
    with MeasuringChild("no-such-benchmark") as child, pytest.raises(SystemExit, match="no-such-benchmark"):
        child.receive()


def test_processes_are_read_from_proc() -> None:
    """CPU seconds for 1000 tokens are made of these."""
    assert 0 < cpu_s([os.getpid()]) <= busy_s()
    assert 1 < peak_memory_mb(os.getpid()) < 1e6


def test_a_child_gets_the_environment_and_what_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the rest of the environment a child finds neither Python's path nor the GPU."""
    monkeypatch.setenv("HERE", "1")
    assert child_environment(CACHE="x").items() >= {"HERE": "1", "CACHE": "x"}.items()
