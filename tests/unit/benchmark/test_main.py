"""Guards the table of benchmarks: every entry can be run, the list needs no torch, and errors are one line."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from baton.benchmark.__main__ import BENCHMARKS, main


def test_help_lists_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    """A benchmark that is not listed is not found."""
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert [name for name in BENCHMARKS if f"  {name} " not in listed] == []


@pytest.mark.parametrize("argv", [[], ["serve"]])
def test_a_missing_or_unknown_name_is_an_error(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A script with a misspelt name must not end with status 0."""
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.out == "" and "baton bench" in said.err


def test_every_entry_names_a_module() -> None:
    """A module that was moved would be missed only by its user."""
    missing = [e.module for e in BENCHMARKS.values() if not importlib.util.find_spec(f"baton.benchmark.{e.module}")]
    assert missing == []


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "exactness",
        "two-gpus",
        "reuse",
        "ttft-tiers",
        "gate",
        "routing",
        "simulator",
        "faults",
        "pick",
        "masks",
        "proxies",
        "tiers",
    ],
)
def test_help_of_a_benchmark_runs_on_a_machine_without_a_gpu(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A percent sign in a help text, or a missing import, fails only here."""
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0 and f"usage: baton bench {name}" in capsys.readouterr().out


def test_the_table_needs_no_torch() -> None:
    """`baton bench --help` would take seconds."""
    code = "import sys, baton.benchmark.__main__; print(*{'torch', 'numpy', 'zmq'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.split() == []


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback hides what was wrong."""
    assert main(["serving", "--base-url", "http://127.0.0.1:1"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("baton bench serving: no server: ") and said.count("\n") == 1


def test_the_null_server_stays_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """It checks nothing of what it reads."""
    with pytest.raises(SystemExit) as ended:
        main(["null-server", "--host", "0.0.0.0"])
    assert ended.value.code == 2 and "refusing to bind" in capsys.readouterr().err
