"""Guards the command `baton`: every subcommand is there with its own help, and loads only what it needs."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from baton import __version__, cli


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the first commands that a user types."""
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in cli.SUBCOMMANDS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"baton {__version__}\n"


@pytest.mark.parametrize("argv", [[], ["sevre"], ["--model", "x"]])
def test_a_wrong_command_is_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a traceback of runpy for a mistyped command."""
    assert cli.main(argv) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", cli.SUBCOMMANDS)
def test_each_subcommand_is_a_module(name: str) -> None:
    """Guards against a subcommand whose module was moved."""
    assert importlib.util.find_spec(cli.SUBCOMMANDS[name].module) is not None


def loaded(*argv: str) -> set[str]:
    """The large libraries that `baton ARGV` has loaded at its end, in a process of its own."""
    code = (
        "import sys; from baton.cli import main; status = main(sys.argv[1:])\n"
        "print('loaded', *{'torch', 'transformers', 'triton', 'zmq', 'fastapi'} & set(sys.modules)); sys.exit(status)"
    )
    command = [sys.executable, "-P", "-c", code, *argv]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_the_help_loads_nothing_and_the_proxy_no_torch() -> None:
    """torch costs seconds and 200 MB; a proxy that loads it was started by a command that imports all roles."""
    assert loaded("--help") == set()
    assert loaded("serve", "--help") == set()
    assert "torch" not in loaded("proxy", "--help")


def test_the_secret_is_made_without_a_socket(tmp_path: Path) -> None:
    """Guards the command against its own name: run as a program, it is `__main__`, where its settings are not found."""
    assert loaded("secret", str(tmp_path / "cluster.secret")) == set()
    assert (tmp_path / "cluster.secret").exists()


def test_a_subcommand_reports_its_own_errors_and_status(capsys: pytest.CaptureFixture[str]) -> None:
    """The name of a command that does not exist in an error message leads nowhere."""
    assert cli.main(["proxy", "--port", "many"]) == 2
    assert capsys.readouterr().err.startswith("baton proxy: error: argument --port: must be a whole number")


def test_the_first_process_of_a_container_ends_at_sigterm_while_it_starts() -> None:
    """Guards `docker stop` of a worker that loads a model: process 1 gets no signal that it has no handler for."""
    isolate = ["unshare", "--pid", "--fork", "--kill-child"]
    if shutil.which("unshare") is None or subprocess.run([*isolate, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets no process have process ids of its own (unshare --pid)")
    code = "import os; from baton import cli; cli.end_at_sigterm(); os.kill(1, 15); print('is still here')"
    done = subprocess.run([*isolate, sys.executable, "-P", "-c", code], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (128 + 15, b""), done.stderr
