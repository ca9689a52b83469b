"""The processes of scripts/serve as children of a benchmark, each of which it may restart: proxy, workers, KV store.

It owns them from their start to their end, on every way out; the kernel ends them where the benchmark is killed. What
is sent to them is the benchmark's.
"""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from baton.benchmark.cluster.metrics import Metrics
from baton.launch import local
from baton.launch.supervisor import ChildSpec, tether

ROOT = Path(__file__).resolve().parents[2]
MODEL = "bench"
"""What requests call the model."""
HTTP_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
POLL_S = 0.05
HEARTBEATS_S = 0.8
"""After so long what workers have counted is in the proxy's metrics."""
TAIL_BYTES = 4000


class BenchmarkFailed(Exception):
    """What the benchmark needs did not come about; the message says what."""


class Cluster:
    """Children by name: proxy, store, prefill-0, decode-0 and so on. Made in the main thread (see node.supervisor)."""

    def __init__(self, specs: Sequence[ChildSpec], port: int, folder: Path, start_timeout_s: float) -> None:
        self.port = port
        self._specs = {spec.name: spec for spec in specs}
        self._folder = folder
        self._start_timeout_s = start_timeout_s
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> float:
        """Start all and wait for the first token; how many seconds it took."""
        begin = time.monotonic()
        for name in self._specs:
            self._spawn(name)
        self.wait_until(self._has_workers, "workers that have joined", self._start_timeout_s)
        self.wait_until(lambda: self._get("/health_generate")[0] == 200, "the first token", self._start_timeout_s)
        return time.monotonic() - begin

    def restart(self, name: str, *more: str) -> None:
        """Kill a worker or the store and start it again, `more` being added to its arguments, until it serves."""
        self._children[name].kill()
        self._children[name].wait(STOP_TIMEOUT_S)
        time.sleep(HEARTBEATS_S)  # the dead one is forgotten
        spec = self._specs[name]
        self._specs[name] = replace(spec, argv=(*spec.argv, *more))
        self._spawn(name)
        self.wait_until(self._has_workers, f"{name} again", self._start_timeout_s)
        self.wait_until(lambda: self._get("/health_generate")[0] == 200, "a token again", self._start_timeout_s)

    def metrics(self, settle_s: float = HEARTBEATS_S) -> Metrics:
        """As they are now: what was counted before the call is in them."""
        time.sleep(settle_s)
        status, text = self._get("/metrics")
        if status != 200:
            raise BenchmarkFailed(f"no metrics: HTTP {status}")
        return Metrics(text.decode())

    def wait_metrics(self, condition: Callable[[Metrics], bool], what: str, timeout_s: float) -> bool:
        """Whether it held in time: for what is good to have."""
        deadline = time.monotonic() + timeout_s
        while not condition(self.metrics(0.0)):
            if time.monotonic() > deadline:
                return False
            time.sleep(4 * POLL_S)
        return True

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Raises BenchmarkFailed, with the end of a log, when it does not hold in time or a child has ended."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            dead = [name for name, child in self._children.items() if child.poll() is not None]
            if dead or time.monotonic() > deadline:
                why = f"{dead[0]} has ended" if dead else f"not within {timeout_s:g} s"
                raise BenchmarkFailed(f"{what}: {why}\n" + "\n".join(map(self.log_tail, dead or self._children)))
            time.sleep(POLL_S)

    def log_tail(self, name: str) -> str:
        return f"--- {name}\n" + (self._folder / name).read_bytes()[-TAIL_BYTES:].decode(errors="replace")

    def stop(self) -> None:
        """Workers and store first, then the proxy; whoever does not end is killed."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for name in sorted(self._children, key=lambda name: name == "proxy"):
            child = self._children[name]
            if child.poll() is None:
                child.terminate()
            if name != "proxy":
                continue
            for each in self._children.values():
                try:
                    each.wait(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    each.kill()
                    each.wait(STOP_TIMEOUT_S)

    def _has_workers(self) -> bool:
        wanted = sum(name.startswith(("prefill-", "decode-")) for name in self._specs)
        status, text = self._get("/metrics")
        if status != 200:
            return False
        metrics = Metrics(text.decode())
        return (
            sum(metrics.total("baton:worker_up", role=role, state="ready") for role in ("prefill", "decode")) >= wanted
        )

    def _get(self, path: str) -> tuple[int, bytes]:
        """Status and body; status 0 where nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HTTP_TIMEOUT_S)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()

    def _spawn(self, name: str) -> None:
        spec = self._specs[name]
        with (self._folder / name).open("ab") as log:
            self._children[name] = subprocess.Popen(
                spec.argv, cwd=ROOT, env=spec.env, stdout=log, stderr=log, preexec_fn=tether(os.getpid())
            )


@contextmanager
def cluster(
    settings: local.ServeSettings, edit: Callable[[ChildSpec], ChildSpec] = lambda spec: spec
) -> Iterator[tuple[Cluster, float]]:
    """The cluster that scripts/serve would run, once it serves, and the seconds from start to ready.

    `edit` may change a child's command. Port and model name of `settings` are replaced.
    """
    port, control_port, store_port = local.free_ports(3)
    settings = replace(settings, port=port, served_model_name=MODEL)
    environ = dict(os.environ)
    placements = local.place_workers(settings, 0)
    ports = local.Ports(control_port, store_port)
    specs = [edit(spec) for spec in local.plan_nodes(settings, ports, placements, environ)]
    with TemporaryDirectory() as folder:
        made = Cluster(specs, port, Path(folder), settings.start_timeout_s)
        try:
            yield made, made.start()
        finally:
            handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends by itself now, and leaves nothing behind
            made.stop()
            signal.signal(signal.SIGTERM, handler)
