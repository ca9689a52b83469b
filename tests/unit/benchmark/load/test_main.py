"""The command line: wrong words are told in a line."""

from __future__ import annotations

import pytest

from baton.benchmark.__main__ import main


@pytest.mark.parametrize("argv", [[], ["serve"], ["--help"]])
def test_an_unknown_command_is_told(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2 and "serving | null-server" in capsys.readouterr().err


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback hides what was wrong."""
    assert main(["serving", "--base-url", "http://127.0.0.1:1"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("bench_serving: no server: ") and said.count("\n") == 1


def test_the_null_server_stays_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """It reads what anybody sends."""
    with pytest.raises(SystemExit) as ended:
        main(["null-server", "--host", "0.0.0.0"])
    assert ended.value.code == 2 and "refusing to bind" in capsys.readouterr().err
