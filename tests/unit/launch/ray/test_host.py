"""launch.ray.host: a node outlives the process that started it, and the next one takes its place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from baton.launch.ray.host import NodeHost, end_predecessor, private_folder, writers_of
from baton.launch.ray.plan import NodePlan
from baton.node.errors import SettingsError
from baton.node.secret_file import read_secret

SECRET = "ab" * 32
SERVES = """
import os, signal, sys
print("up", flush=True)
os.write(int(sys.argv[1]), b"up")
while os.read(0, 1): pass
print("orphaned", flush=True)
signal.pause()
"""
"""A child that says that it is up, and that goes on when its standard input ends."""


@dataclass(frozen=True, slots=True)
class ScriptPlan(NodePlan):
    """A node whose command is a small program."""

    program: str = ""

    def command(self, host: str, secret_file: str) -> tuple[str, ...]:
        assert read_secret(Path(secret_file)).hex() == SECRET
        return (sys.executable, "-c", self.program)


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("baton.launch.ray.host.tempfile.gettempdir", lambda: str(tmp_path))
    yield


def _until(condition: Callable[[], bool]) -> None:
    """Poll; the test's own limit of time ends it."""
    while not condition():
        threading.Event().wait(0.02)


def _host(program: str, given_up: threading.Event) -> NodeHost:
    plan = ScriptPlan("decode-0", "decode", (), 1.0, 0.0, program=program)
    return NodeHost(plan, "deployment", "127.0.0.1", SECRET, "", 20.0, given_up.set)


def test_a_node_that_ends_again_and_again_is_given_up() -> None:
    """Guards a machine that cannot run it: Ray may start it on another. The reasons are in the report."""
    given_up = threading.Event()
    host = _host("raise SystemExit(5)", given_up)
    host.start()
    assert given_up.wait(60)
    assert "given up" in host.report().messages[-2] and host.report().pid == 0


def test_a_node_is_drained_and_its_secret_removed(tmp_path: Path) -> None:
    given_up = threading.Event()
    host = _host("import signal; signal.pause()", given_up)
    host.start()
    host.stop()
    assert not list(tmp_path.rglob("deployment*")) and not given_up.is_set()


HOST = """
import threading
from baton.tests.unit.launch.ray import test_host
test_host._host(test_host.SERVES.replace("sys.argv[1]", "1"), threading.Event()).start()
threading.Event().wait()
"""


def test_a_node_outlives_its_actor(tmp_path: Path) -> None:
    """Guards streams when Ray ends an actor, or its head is gone: the node notices it, and serves on."""
    actor = subprocess.Popen([sys.executable, "-P", "-c", HOST], env=os.environ | {"TMPDIR": str(tmp_path)})
    _until(lambda: any("up" in log.read_text() for log in tmp_path.rglob("log")))
    (log,) = tmp_path.rglob("log")
    (orphan,) = writers_of(log)
    actor.kill()
    actor.wait()
    _until(lambda: "orphaned" in log.read_text())
    assert writers_of(log) == [orphan]
    end_predecessor(log, 30.0, threading.Event())
    assert writers_of(log) == []


def test_what_an_earlier_actor_has_left_is_drained_before_the_next(tmp_path: Path) -> None:
    """Guards the GPU and the port of a node, which its orphan holds."""
    log = tmp_path / "log"
    read_end, write_end = os.pipe()
    with open(log, "wb") as file:
        orphan = subprocess.Popen(
            [sys.executable, "-c", SERVES, str(write_end)],
            stdin=subprocess.PIPE,
            stdout=file,
            process_group=0,
            pass_fds=[write_end],
        )
    os.close(write_end)
    assert os.read(read_end, 2) == b"up"
    assert writers_of(log) == [orphan.pid]
    ending = threading.Thread(target=end_predecessor, args=(log, 30.0, threading.Event()))
    ending.start()
    assert orphan.wait(60) == -signal.SIGTERM
    ending.join(60)
    assert not ending.is_alive()
    os.close(read_end)


def test_one_that_does_not_drain_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with open(log, "wb") as file:
        orphan = subprocess.Popen(["sh", "-c", "trap '' TERM; echo up; sleep 300"], stdout=file, process_group=0)
    _until(lambda: "up" in log.read_text())  # it ignores the signal from here on
    assert writers_of(log) == [orphan.pid]
    end_predecessor(log, 0.0, threading.Event())
    assert orphan.wait(60) == -signal.SIGKILL


def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    """Guards the secret: the folder's name can be guessed, and made before by another user of the machine."""
    (tmp_path / f"baton-ray-{os.geteuid()}").mkdir(mode=0o755)
    with pytest.raises(SettingsError, match="0700"):
        private_folder("deployment", "decode-0")
