"""Guards the fork server: a node that it starts ends, is killed and writes its log as a process of its own does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.launch.local import free_port
from baton.launch.supervisor import ChildSpec, signal_group
from baton.testing.fork_server import ForkedNode, ForkServer

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the fork server is for Linux")
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    made = ForkServer(programs=())
    yield made
    made.close()


def start(server: ForkServer, log: Path, module: str, *arguments: str, **environ: str) -> ForkedNode:
    spec = ChildSpec(name="x", group="x", argv=(sys.executable, "-P", "-m", module, *arguments), env=environ)
    with log.open("ab") as file:
        return server.start(spec, file)


def test_a_node_has_its_own_arguments_environment_and_log(server: ForkServer, tmp_path: Path) -> None:
    """A node with the command line or the environment of the server, or of the node before it."""
    code = "import os, sys; print(sorted(os.environ), sys.argv[1:])"
    for name in ("ONE", "TWO"):
        node = start(server, tmp_path / name, "timeit", "-n1", "-r1", code, **{name: "1"})
        assert node.wait(TIMEOUT_S) == 0
        expected = f"{[name]} {['-n1', '-r1', code]}"
        assert (tmp_path / name).read_text().splitlines()[0] == expected


def test_a_node_that_fails_leaves_a_traceback_and_the_status_of_python(server: ForkServer, tmp_path: Path) -> None:
    """A cluster that reports a failed start without its reason, or as a success."""
    node = start(server, tmp_path / "log", "no_such_module")
    assert node.wait(TIMEOUT_S) == node.poll() == 1
    assert "No module named no_such_module" in (tmp_path / "log").read_text()


def test_a_node_ends_after_its_threads_and_calls_with_its_own_status(server: ForkServer, tmp_path: Path) -> None:
    """A node that ends before it has written all, or that fails and seems not to."""
    code = "import atexit, threading; atexit.register(print, 'end'); threading.Timer(0.1, print, ['timer']).start()"
    assert start(server, tmp_path / "log", "timeit", "-n1", "-r1", code).wait(TIMEOUT_S) == 0
    assert (tmp_path / "log").read_text().split()[-2:] == ["timer", "end"]
    assert start(server, tmp_path / "log", "base64", "--none").wait(TIMEOUT_S) == 2


def test_a_node_is_killed_by_its_group(server: ForkServer, tmp_path: Path) -> None:
    """A test that kills a node, and kills itself, or the server, or nothing."""
    node = start(server, tmp_path / "log", "http.server", str(free_port()), "--bind", "127.0.0.1")
    assert os.getpgid(node.pid) == node.pid
    with pytest.raises(subprocess.TimeoutExpired):
        node.wait(0.0)
    assert node.poll() is None and signal_group(node.pid, signal.SIGKILL)
    assert node.wait(TIMEOUT_S) == -signal.SIGKILL
    assert start(server, tmp_path / "log", "calendar").wait(TIMEOUT_S) == 0


def test_a_signal_ends_a_node_as_its_default_says(server: ForkServer, tmp_path: Path) -> None:
    """A node that inherits the handlers of the server."""
    node = start(server, tmp_path / "log", "http.server", str(free_port()), "--bind", "127.0.0.1")
    node.send_signal(signal.SIGTERM)
    assert node.wait(TIMEOUT_S) == -signal.SIGTERM
    node.send_signal(signal.SIGTERM)


def test_no_node_outlives_the_server(tmp_path: Path) -> None:
    """Nodes that run on when the tests have ended."""
    server = ForkServer(programs=())
    node = start(server, tmp_path / "log", "http.server", str(free_port()), "--bind", "127.0.0.1")
    server.close()
    assert node.wait(TIMEOUT_S) == -signal.SIGKILL
