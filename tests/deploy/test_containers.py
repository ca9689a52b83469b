"""The image and deploy/compose.yaml, run by Docker: a cluster of containers that answers, loses a worker, and drains.

Building the image takes minutes, so these tests take one that is there: BATON_TEST_IMAGE=baton:cpu scripts/test
tests/deploy/test_containers.py. docs/deployment.md says how it is built.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import httpx
import pytest

from baton.launch.local import free_port
from baton.tests.deploy.compose import FOLDER
from baton.tests.deploy.tools import skip

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(900)]

PATIENCE_S = 300.0
PROJECT = "baton-test"
NODES = {"proxy": 1, "prefill": 2, "decode": 2, "store": 1}
LONG: dict[str, Any] = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 150, "ignore_eos": True}
_READY = re.compile(r'^baton:workers\{role="(\w+)",state="ready"\} (\S+)$', re.M)
_RUNNING = re.compile(r'^baton:worker_running\{role="decode",worker="decode-(\w+)-(\d+)"\} 1\.0$', re.M)


class Deployed:
    """The Compose project: its containers, and its API."""

    def __init__(self, image: str) -> None:
        self.port = free_port()
        self._env = {**os.environ, "BATON_IMAGE": image, "BATON_PORT": str(self.port)}

    def compose(self, *arguments: str) -> str:
        command = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
        named = ["-p", PROJECT, "-f", str(FOLDER / "compose.yaml")]
        return self._run([*command, *named, *arguments])

    def inspect(self, container: str) -> dict[str, Any]:
        return dict(json.loads(self._run(["docker", "inspect", container]))[0])

    def execute(self, container: str, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["docker", "exec", container, *command], capture_output=True, text=True, timeout=60)

    @cached_property
    def containers(self) -> dict[str, list[str]]:
        """Ids of the containers of each node."""
        return {name: self.compose("ps", "-q", name).split() for name in NODES}

    def metrics(self) -> str:
        return httpx.get(f"http://127.0.0.1:{self.port}/metrics", timeout=30).text

    def ready(self) -> dict[str, int]:
        """Ready workers and stores, by their role; none while no proxy answers."""
        try:
            return {role: int(float(number)) for role, number in _READY.findall(self.metrics())}
        except httpx.HTTPError:
            return {}

    def stream(self, **body: Any) -> Iterator[list[int]]:
        """The tokens of a completion, as they come."""
        payload = {**LONG, **body, "stream": True, "return_token_ids": True}
        url = f"http://127.0.0.1:{self.port}/v1/completions"
        with httpx.stream("POST", url, json=payload, timeout=PATIENCE_S) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line[6:])["choices"][0].get("token_ids") or []

    def _run(self, command: list[str]) -> str:
        done = subprocess.run(command, env=self._env, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stderr
        return done.stdout


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} s: {what}"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def deployed() -> Iterator[Deployed]:
    image = os.environ.get("BATON_TEST_IMAGE")
    if not image:
        skip("BATON_TEST_IMAGE names no image: containers are not run")
    if subprocess.run(["docker", "image", "inspect", str(image)], capture_output=True).returncode:
        skip(f"Docker does not run here, or has no image {image}")
    deployed = Deployed(str(image))
    try:
        deployed.compose("up", "--detach", "--no-build")
        wait_until(lambda: deployed.ready().items() >= {"prefill": 2, "decode": 2}.items(), "all workers are ready")
        yield deployed
    finally:
        deployed.compose("down", "--volumes", "--timeout", "60")


def test_no_container_has_rights(deployed: Deployed) -> None:
    """Guards against root, capabilities, and a root that can be written."""
    for name, ids in deployed.containers.items():
        assert len(ids) == NODES[name]
        found = deployed.inspect(ids[0])
        assert found["HostConfig"]["ReadonlyRootfs"] and found["HostConfig"]["CapDrop"] == ["ALL"], name
        assert deployed.execute(ids[0], "id", "-u").stdout == "10001\n"
        status = deployed.execute(ids[0], "cat", "/proc/self/status").stdout
        assert re.search(r"^CapEff:\t0+$", status, re.M) and re.search(r"^NoNewPrivs:\t1$", status, re.M)
        assert deployed.execute(ids[0], "sh", "-c", "echo > /opt/baton/x").returncode != 0, name


def test_a_killed_decode_worker_changes_no_token(deployed: Deployed) -> None:
    """Guards an answer over three containers, and its continuation on a worker in another one."""
    for body in ({"temperature": 0}, {"temperature": 1, "seed": 7}):
        expected = [token for tokens in deployed.stream(**body) for token in tokens]
        assert len(expected) == LONG["max_tokens"]
        stream = deployed.stream(**body)
        tokens = [token for _ in range(10) for token in next(stream)]
        ((host, pid),) = _RUNNING.findall(deployed.metrics())
        (victim,) = [each for each in deployed.containers["decode"] if each.startswith(host)]
        assert deployed.execute(victim, "sh", "-c", f"kill -KILL {pid}").returncode == 0
        tokens += [token for chunk in stream for token in chunk]
        assert tokens == expected
        wait_until(lambda: deployed.ready().get("decode") == 2, "Docker has started the worker again")


def test_workers_of_one_host_map_the_memory_of_its_store(deployed: Deployed) -> None:
    """Guards the shared process ids: without them, no worker reaches the store's memory and every lookup misses."""
    logs = deployed.compose("logs", "--no-color", "prefill", "decode")
    assert logs.count("store_attached") >= 4 and "its memory cannot be mapped" not in logs


def test_stop_drains_every_container(deployed: Deployed) -> None:
    """Guards the signal's way to the process: a container that is killed at the end of its time has status 137."""
    deployed.compose("stop")
    for name, ids in deployed.containers.items():
        assert [deployed.inspect(each)["State"]["ExitCode"] for each in ids] == [0] * NODES[name], name
