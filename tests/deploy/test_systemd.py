"""deploy/systemd: units that systemd reads without a complaint, and whose commands their nodes take."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from baton.node.settings import parse
from baton.tests.deploy.compose import FOLDER
from baton.tests.deploy.test_image_files import SETTINGS
from baton.tests.deploy.tools import skip

pytestmark = pytest.mark.deploy

UNITS = FOLDER / "systemd"
PROGRAM = "/opt/baton/bin/baton"
NODES = {
    "baton-proxy.service",
    "baton-store.service",
    "baton-prefill@.service",
    "baton-decode@.service",
    "baton-stage@.service",
}


def environment() -> dict[str, str]:
    lines = (UNITS / "baton.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def command_of(unit: str) -> list[str]:
    """The command of a unit as systemd makes it: ${NAME} is a part of a word, $NAME any number of words."""
    text = (UNITS / unit).read_text().replace("\\\n", "")
    (line,) = re.findall(r"^ExecStart=(.*)$", text, re.M)
    found = re.sub(r"\$\{?(\w+)\}?", lambda name: environment()[name[1]], line)
    return shlex.split(re.sub("%.", "0", found))


def test_all_units_are_there() -> None:
    """Guards these tests against a unit that none of them looks at."""
    assert {path.name for path in UNITS.iterdir()} == {*NODES, "baton.target", "baton.env"}


@pytest.mark.parametrize("unit", sorted(NODES))
def test_every_command_is_one_that_its_node_takes(unit: str) -> None:
    """Guards against an option that was renamed, and a time to stop that is shorter than the drain."""
    program, node, *arguments = command_of(unit)
    settings = parse(SETTINGS[node], arguments, prog=node, description="", environ={})
    text = (UNITS / unit).read_text()
    (stop_s,) = re.findall(r"^TimeoutStopSec=(\d+)$", text, re.M)
    assert program == PROGRAM and node in unit
    assert float(stop_s) > getattr(settings, "drain_s", 0) and "\nKillMode=mixed\n" in text


def test_systemd_reads_the_units_without_a_word(tmp_path: Path) -> None:
    """Guards against misspelt sections and settings, which systemd ignores: its status is 0 all the same."""
    if shutil.which("systemd-analyze") is None:
        skip("systemd-analyze is not on the PATH: it comes with Debian's package systemd")
    program = tmp_path / "baton"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    names = []
    for path in UNITS.glob("baton*.*"):
        if path.suffix in (".service", ".target"):
            name = path.name.replace("@.", "@0.")
            (tmp_path / name).write_text(path.read_text().replace(PROGRAM, str(program)))
            names.append(str(tmp_path / name))
    done = subprocess.run(["systemd-analyze", "verify", *names], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
