"""The command lines that the chart renders serve the demo model, as processes of this machine.

No kubelet is there to start them as pods, so this stands in for it: files of Secrets, environment variables in
arguments, names of Services, probes, SIGTERM. The other tests of the chart compare text with text.
"""

from __future__ import annotations

import base64
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from baton.launch.local import free_port
from baton.tests.deploy.chart import CHART, FULLNAME, ROOT, Object, container, of_kind, one, pod_templates, render
from baton.tests.deploy.tools import promtool

pytestmark = pytest.mark.deploy

START_S = 120.0
OF_STYLE = 3
"""promtool's status where it dislikes names, as it does vLLM's, and reads them."""
POLL_S = 0.1


@dataclass(slots=True)
class Node:
    """A pod's container, as a process."""

    probes: str
    process: subprocess.Popen[bytes]
    log: Path

    def status(self, path: str) -> int:
        """Of a probe; 0 where nothing listens."""
        try:
            with urllib.request.urlopen(self.probes + path, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while self.status("/ready") != 200:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-2000:]
            time.sleep(POLL_S)


@dataclass(slots=True)
class Host:
    """This machine in place of a cluster: addresses and files of pods become its own."""

    objects: list[Object]
    folder: Path
    http_port: int = field(default_factory=free_port)
    control_port: int = field(default_factory=free_port)
    stages_port: int = field(default_factory=free_port)
    nodes: dict[str, Node] = field(default_factory=dict)

    def start(self, component: str) -> None:
        template = pod_templates(self.objects)[component]
        self._write_secrets(template)
        probe_port = self.http_port if component == "proxy" else free_port()
        replaced = {
            "/etc/baton": str(self.folder),
            "$(POD_NAME)": f"{component}-0",
            "$(LWS_LEADER_ADDRESS):5572": f"127.0.0.1:{self.stages_port}",
            "$(POD_IP):5572": f"127.0.0.1:{self.stages_port}",
            f"{FULLNAME}-proxy-0.{FULLNAME}-proxy.llm.svc:5570": f"127.0.0.1:{self.control_port}",
            "$(POD_IP):5570": f"127.0.0.1:{self.control_port}",
            "$(POD_IP)": "127.0.0.1",
            "--port=8000": f"--port={self.http_port}",
            "--probe-port=8080": f"--probe-port={probe_port}",
        }
        arguments = [*container(template)["command"], *container(template)["args"]][1:]
        for old, new in replaced.items():
            arguments = [each.replace(old, new) for each in arguments]
        log = self.folder / f"{component}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "baton", *arguments], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
            )
        self.nodes[component] = Node(f"http://127.0.0.1:{probe_port}", process, log)

    def _write_secrets(self, template: Object) -> None:
        """As a kubelet does, but for the owner: a file of this user's must be closed to its group too."""
        mounts = {each["name"]: each["mountPath"] for each in container(template)["volumeMounts"]}
        for volume in template["spec"]["volumes"]:
            if (secret := volume.get("secret")) is not None:
                data = one(self.objects, "Secret", secret["secretName"])["data"]
                for item in secret["items"]:
                    file = self.folder / Path(mounts[volume["name"]]).relative_to("/etc/baton") / item["path"]
                    file.parent.mkdir(exist_ok=True)
                    file.unlink(missing_ok=True)
                    file.touch(0o600)
                    file.write_bytes(base64.b64decode(data[item["key"]]))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    threads = (f"{component}.options.threads=1" for component in ("prefill", "stage", "decode"))
    host = Host(render("demo", "apiKeys.enabled=true", "prefill.stages=2", *threads), tmp_path_factory.mktemp("pods"))
    try:
        for component in ("proxy", "prefill", "stage", "decode"):
            host.start(component)
        for node in host.nodes.values():
            node.wait_ready()
        yield host
    finally:
        for node in host.nodes.values():
            node.process.kill()
            node.process.wait()


def ask(host: Host, key: str) -> subprocess.CompletedProcess[str]:
    """What the pod of `helm test` runs, with its arguments."""
    (test,) = of_kind(host.objects, "Pod")
    (pod,) = test["spec"]["containers"]
    text, _, model = pod["args"]
    assert text == (CHART / "files" / "completion.py").read_text()
    return subprocess.run(
        [sys.executable, "-c", text, f"http://127.0.0.1:{host.http_port}", model],
        env={"PATH": os.environ["PATH"], "KEY": key},
        capture_output=True,
        text=True,
        timeout=120,
    )


def api_key(host: Host) -> str:
    return base64.b64decode(one(host.objects, "Secret", f"{FULLNAME}-api-keys")["data"]["api-key"]).decode()


def metrics(host: Host) -> str:
    headers = {"Authorization": f"Bearer {api_key(host)}"}
    request = urllib.request.Request(f"http://127.0.0.1:{host.http_port}/metrics", headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(answer.read().decode())


def test_prometheus_reads_the_metrics(host: Host) -> None:
    """Guards against a page that Prometheus refuses, and one that lacks what autoscalers ask for."""
    asked_for = ("desired_replicas", "worker_waiting_tokens", "worker_running")  # with the role that they are asked for
    series = [re.compile(rf'baton:{name}{{[^}}]*role="decode"') for name in asked_for]
    deadline = time.monotonic() + START_S
    while not all(each.search(page := metrics(host)) for each in series):
        assert time.monotonic() < deadline, page
        time.sleep(POLL_S)
    done = subprocess.run([promtool(), "check", "metrics"], input=page, capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, OF_STYLE), done.stderr


def test_the_rendered_nodes_serve_and_drain(host: Host) -> None:
    """Guards against pods that never get ready, do not find one another, or end with an error when they are stopped."""
    answered = ask(host, api_key(host))
    assert answered.returncode == 0, answered.stdout + answered.stderr
    assert ask(host, "wrong").returncode != 0
    assert all(node.status("/live") == 200 for node in host.nodes.values())
    for node in host.nodes.values():
        node.process.send_signal(signal.SIGTERM)
    for name, node in host.nodes.items():
        assert node.process.wait(60) == 0, (name, node.log.read_text()[-2000:])
