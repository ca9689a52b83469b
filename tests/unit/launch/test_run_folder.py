"""launch.run_folder and `baton secret`: a secret that only this user can read, and that is gone after the run."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from baton.launch import secret
from baton.launch.run_folder import RunFolder
from baton.node.secret_file import read_secret


def test_a_run_has_a_private_folder_with_a_secret_of_its_own() -> None:
    """Guards the links of `baton serve` against other users of the machine, and runs against one another."""
    with RunFolder() as first, RunFolder() as second:
        assert stat.S_IMODE(first.path.stat().st_mode) == 0o700
        assert read_secret(first.secret_file) != read_secret(second.secret_file)
    assert not first.path.exists() and not second.path.exists()
    first.close()


def test_the_command_makes_a_file_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards a running cluster, whose secret a second call would replace; the secret itself is never printed."""
    path = tmp_path / "cluster.secret"
    assert secret.main([str(path)]) == 0
    made = read_secret(path)
    assert secret.main([str(path)]) == 2 and read_secret(path) == made
    output = capsys.readouterr()
    assert "--secret-file" in output.out and "File exists" in output.err
    assert made.hex() not in output.out + output.err
