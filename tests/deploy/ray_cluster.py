"""`baton ray` on a Ray cluster of three pretended machines: its processes, found and killed by tests.

Ray is a wheel of 79 MB, and its start takes both cores of CI a minute, so CI does not install it. The tests run where
the Python at hand has it, or the one in the user's cache that INSTALL makes.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import httpx

from baton.launch.local import free_port
from baton.tests.deploy.tools import CACHE, skip
from baton.tests.integration.cluster import NO_TLS, Stream

ROOT = Path(__file__).resolve().parents[2]
PYTHON = CACHE / "ray" / "bin" / "python"
INSTALL = f"python3 -m venv {CACHE}/ray && {PYTHON} -m pip install '{ROOT}[ray]'"
START_S = 240.0
_PROCESS = re.compile(r"^(\S+): process ([1-9]\d*) on \S+, log (\S+)$", re.MULTILINE)


def python_with_ray() -> str:
    """The interpreter to run Ray with. Skips the test where there is none."""
    if any(importlib.metadata.distributions(name="ray")):
        return sys.executable
    if not PYTHON.exists():
        skip(f"Ray is not installed; {INSTALL}")
    return str(PYTHON)


class Machines:
    """The pretended machines, which may have several deployments. Started by entering it."""

    def __init__(self, folder: Path) -> None:
        self.python = python_with_ray()
        self.env = os.environ | {"PYTHONPATH": str(ROOT / ".link"), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
        self.env |= {"RAY_TMPDIR": "/tmp"}  # paths of sockets are short

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [self.python, "-P", "-m", "baton.tests.deploy.ray_machines"],
            env=self.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(120)

    def head(self) -> int:
        """The process of Ray's head that all others need."""
        children = [pid for pid in _pids() if _parent(pid) == self._process.pid]
        return next(pid for pid in children if "gcs_server" in Path(f"/proc/{pid}/cmdline").read_text())


class RayCluster:
    """One deployment. Started by entering it, with all its `num_nodes`. Processes are named as `baton ray` names their
    nodes: proxy, prefill-0, decode-1."""

    def __init__(self, machines: Machines, output: Path, num_nodes: int, *arguments: str) -> None:
        self._machines = machines
        self._num_nodes = num_nodes
        self._arguments = arguments
        self._port = free_port()
        self._output = output
        self.url = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        where = ("--address", self._machines.address, "--port", str(self._port), "--control-port", str(free_port()))
        with self._output.open("w") as output:
            self._driver = subprocess.Popen(
                [self._machines.python, "-P", "-m", "baton", "ray", "--device", "cpu", *where, *self._arguments],
                env=self._machines.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            self.wait_until(lambda: "ready http" in self.output(), "the first token", START_S)
            self.wait_until(lambda: len(self.processes()) == self._num_nodes, "all processes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self._driver.poll() is None:
            self._driver.send_signal(signal.SIGTERM)
            self._driver.wait(120)

    def kill_command(self) -> None:
        self._driver.kill()
        self._driver.wait()

    def down(self) -> str:
        """What `baton ray --down` prints."""
        name = self._arguments[self._arguments.index("--name") + 1]
        command = [self._machines.python, "-P", "-m", "baton", "ray", "--down", "--name", name]
        address = ("--address", self._machines.address)
        ended = subprocess.run(
            [*command, *address], env=self._machines.env, check=True, stdout=subprocess.PIPE, text=True
        )
        return ended.stdout

    # -- processes

    def output(self) -> str:
        """What `baton ray` has printed."""
        return self._output.read_text()

    def processes(self) -> dict[str, int]:
        """The last process of each node."""
        return {name: int(pid) for name, pid, _ in _PROCESS.findall(self.output())}

    def log(self, name: str) -> str:
        """Of a node, over all its lives."""
        return Path(next(log for each, _, log in _PROCESS.findall(self.output()) if each == name)).read_text()

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = 120.0) -> None:
        for _ in range(int(timeout_s / 0.1)):
            if condition():
                return
            threading.Event().wait(0.1)
        raise AssertionError(f"{what}: not within {timeout_s:g} s\n{self.output()}")

    # -- requests

    def stream(self, prompt: str, **body: Any) -> Stream:
        return Stream(self._chunks({"model": "demo", "prompt": prompt, "stream": True, **body}))

    def metric(self, name: str, *labels: str) -> float:
        """The sum of a metric of the proxy, of series with all of these labels."""
        lines = httpx.get(f"{self.url}/metrics", verify=NO_TLS, timeout=30).text.splitlines()
        lines = [line for line in lines if line.startswith((f"{name}{{", f"{name} "))]
        return sum(float(line.rpartition(" ")[2]) for line in lines if all(label in line for label in labels))

    def _chunks(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        url = f"{self.url}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=120, verify=NO_TLS) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield json.loads(line.removeprefix("data: "))


def machine_of(pid: int) -> list[int]:
    """What dies with the machine of a node's process: it, its actor, and Ray's daemon there."""
    actor = _parent(pid)
    return [_parent(actor), actor, pid]


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
    except OSError:
        return 0


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
