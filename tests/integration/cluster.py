"""Real processes on this machine for the integration tests: a proxy and any number of workers, killed and cleaned up.

    with Cluster(prefill=2, decode=2) as cluster:
        cluster.complete("Once upon a time", max_tokens=8)
        cluster.nodes.kill("decode-0")

Every wait is bounded. On leaving, all processes must exit within their drain time (a worker that leaks a block fails
`check()` and so exits with an error), unless the test killed them.
"""

from __future__ import annotations

import json
import os
import re
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import httpx

from baton.launch import cluster as launch
from baton.launch.local import ServeSettings
from baton.launch.supervisor import ChildSpec
from baton.testing.fork_server import ForkServer
from baton.testing.relay_board import RelayBoard

ROOT = Path(__file__).resolve().parents[2]
_WORKER_LINE = re.compile(
    r'baton:worker_(?P<name>\w+)\{role="(?P<role>\w+)",worker="(?P<worker>[\w-]+)"\} (?P<value>\S+)'
)
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 120.0
WAIT_TIMEOUT_S = 120.0  # of a machine that is busy with other tests
MIN_POLL_S, MAX_POLL_S = 0.02, 0.06
"""A page of metrics takes the proxy 20 ms, in which it serves nothing: a condition on one is checked less often."""
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Given to httpx, which otherwise reads all certificates of the system for each request: 40 ms."""
LISTEN, ESTABLISHED = "0A", "01"
"""States of a socket in /proc/net/tcp."""


class Stream:
    """One streamed completion, read by a thread: the chunks received so far, and how it ended."""

    def __init__(self, chunks: Iterator[dict[str, Any]]) -> None:
        self.id = ""
        self.text = ""
        self.num_chunks = 0
        self.finish = ""
        self.error: dict[str, Any] | None = None
        self.broken: Exception | None = None
        self._chunks = chunks
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def join(self, timeout_s: float = 120.0) -> Self:
        """Wait for the end of the stream."""
        self._thread.join(timeout_s)
        assert self.ended, f"a stream has not ended after {timeout_s} s, {self.num_chunks} chunks"
        return self

    def _read(self) -> None:
        try:
            for chunk in self._chunks:
                self.id = chunk.get("id", self.id)
                self.error = chunk.get("error")
                for choice in chunk.get("choices", ()):
                    self.text += choice["text"]
                    self.finish = choice["finish_reason"] or self.finish
                self.num_chunks += 1
        except (httpx.TransportError, AssertionError) as error:
            self.broken = error


def _worker_values(page: list[str], name: str) -> dict[str, float]:
    """A metric of every live worker on a page of metrics, by worker."""
    found = (match for line in page if (match := _WORKER_LINE.fullmatch(line)) and match["name"] == name)
    return {match["worker"]: float(match["value"]) for match in found if match["role"] != "store"}


@cache
def fork_server() -> ForkServer:
    """One for all clusters of this process."""
    return ForkServer()


def start_node(spec: ChildSpec, log: BinaryIO) -> launch.NodeProcess:
    """Start a node as a fork of a process that has imported what it needs; on systems other than Linux, as `serve`."""
    if sys.platform.startswith("linux"):
        return fork_server().start(spec, log)
    return launch.start_process(spec, log)


@dataclass(slots=True)
class Cluster:
    """A cluster on the CPU for tests: requests, metrics and waits. `nodes` starts, kills and freezes its processes."""

    prefill: int = 1
    decode: int = 1
    proxies: int = 1
    model: str = "demo"
    proxy_args: tuple[str, ...] = ("--local-prefill", "never")
    worker_args: tuple[str, ...] = ()
    prefill_args: tuple[str, ...] = ()
    decode_args: tuple[str, ...] = ()
    store_args: tuple[str, ...] | None = None
    """Options of the host's KV store; None: there is none."""
    prefill_step_s: float = 0.0
    decode_step_s: float = 0.0
    """Least time of a step, for tests that must meet a request in one of its phases; 0: as fast as it goes."""
    cut_off_file: Path | None = None
    """While it exists, prefill workers reach no decode worker; None: they always do."""
    api_key: str = ""
    """The one that the proxy asks for; empty: none."""
    tenants: Path | None = None
    """The file of tenants, of which one that may read the metrics has `api_key`; None: there is none."""
    log_folder: Path | None = None
    relays: RelayBoard | None = None
    """What all links lead through; None: links are direct."""
    forked: bool = True
    """Whether `start_node` starts the nodes; False: they are started as by `serve`."""
    nodes: launch.Cluster = field(init=False)

    def __post_init__(self) -> None:
        settings = ServeSettings(
            model=self.model,
            prefill=self.prefill,
            decode=self.decode,
            proxies=self.proxies,
            device="cpu",
            store_ram_gib=0.0 if self.store_args is None else 0.1,
            api_key=(self.api_key,) if self.api_key and self.tenants is None else (),
            tenants=self.tenants,
            proxy_arg=self.proxy_args,
            worker_arg=("--drain-s", "60", *self.worker_args),
            prefill_arg=self.prefill_args,
            decode_arg=self.decode_args,
            store_arg=self.store_args or (),
            start_timeout_s=START_TIMEOUT_S,
        )
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.nodes = launch.Cluster(
            settings,
            log_folder=self.log_folder,
            edit=self._for_tests,
            start=start_node if self.forked else launch.start_process,
            environ=environ,
        )

    @property
    def url(self) -> str:
        return self.nodes.url

    @property
    def secret_args(self) -> tuple[str, str]:
        """Options of nodes of another cluster that shall have links with nodes of this one."""
        return "--secret-file", str(self.nodes.ports.secret_file)

    def __enter__(self) -> Self:
        self.nodes.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.nodes.kill_all()
            return
        bad = self.nodes.stop(STOP_TIMEOUT_S)
        assert not bad, f"these did not end cleanly: {bad}"

    # -- metrics

    def num_workers(self) -> int:
        """Live workers according to the proxy's metrics."""
        lines = [line for line in self.metrics() if line.startswith("baton:worker_up{") and line.endswith(" 1.0")]
        return len([line for line in lines if 'role="store"' not in line])

    def metrics(self) -> list[str]:
        return self._get("/metrics").text.splitlines()

    def worker_values(self, name: str) -> dict[str, float]:
        """A metric of every live worker, such as "running", by worker."""
        return _worker_values(self.metrics(), name)

    def store_value(self, name: str) -> float:
        """A metric of the host's store; 0 while it reports none."""
        lines = [line for line in self.metrics() if line.startswith(f"baton:store_{name}{{")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def counter(self, name: str) -> float:
        """A counter of the proxy's engine, such as "retries"."""
        return self._sum(f"baton:{name}_total")

    def retries(self) -> float:
        """Attempts that were followed by others, but for those on workers that were silent for a while: a busy machine
        holds up one that is not meant to fail."""
        while True:  # until none fails between the readings
            silent = self._silent_attempts()
            retries = self.counter("retries")
            if silent == self._silent_attempts():
                return retries - silent

    def gauge(self, name: str) -> float:
        """A gauge of the proxy's engine, such as "queued_requests"."""
        return self._sum(f"baton:{name}")

    def queued(self) -> float:
        """Requests that are queued in the proxy."""
        return self.gauge("queued_requests")

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = WAIT_TIMEOUT_S) -> None:
        """Poll until `condition` holds; `what` describes it in the error."""
        deadline = time.monotonic() + timeout_s
        while True:
            began_at = time.monotonic()
            if condition():
                return
            now = time.monotonic()
            assert now < deadline, f"{what}: not within {timeout_s} s\n" + "\n".join(self._worker_lines())
            time.sleep(min(MAX_POLL_S, max(MIN_POLL_S, 3 * (now - began_at))))

    def wait_workers(self, *names: str, timeout_s: float = START_TIMEOUT_S) -> None:
        """Until exactly these workers are members."""
        self.wait_until(lambda: set(self.worker_values("running")) == set(names), f"members {names}", timeout_s)

    def wait_idle(self, timeout_s: float = WAIT_TIMEOUT_S) -> None:
        """Until no worker has work, and every block of each is free or cached."""
        self.wait_until(self._is_idle, "idle workers that hold no block", timeout_s)

    def wait_end(self, name: str) -> int:
        """The exit status of a node that ends by itself."""
        return self.nodes.wait_end(name, WAIT_TIMEOUT_S)

    def ports(self, name: str) -> list[int]:
        """The TCP ports that a process listens on, from /proc."""
        return sorted(port for port, state in self._sockets(name) if state == LISTEN)

    def peers_hung_up(self, name: str) -> bool:
        """Whether no connection that a process has accepted is still open at its other end."""
        ports = self.ports(name)
        return not any(state == ESTABLISHED and port in ports for port, state in self._sockets(name))

    # -- requests

    def complete(self, prompt: str | list[int], **body: Any) -> dict[str, Any]:
        """One non-streaming completion; greedy unless the body says otherwise."""
        payload = {"model": self.nodes.model, "prompt": prompt, "temperature": 0, **body}
        answer = httpx.post(
            f"{self.url}/v1/completions", json=payload, headers=self._headers, timeout=120, verify=NO_TLS
        )
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def stream(self, prompt: str | list[int], **body: Any) -> Iterator[dict[str, Any]]:
        """The chunks of one streamed completion, as they arrive."""
        payload = {"model": self.nodes.model, "prompt": prompt, "temperature": 0, "stream": True, **body}
        with httpx.stream(
            "POST", f"{self.url}/v1/completions", json=payload, headers=self._headers, timeout=120, verify=NO_TLS
        ) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield json.loads(line.removeprefix("data: "))

    def begin(self, prompt: str, **body: Any) -> Stream:
        """A streamed completion that is read in a thread of its own."""
        return Stream(self.stream(prompt, **body))

    # -- internals

    def _silent_attempts(self) -> int:
        logs = [self.nodes.log(name) for name in self.nodes.names() if name.startswith("proxy")]
        return sum("attempt_ended" in line and "was lost: silent" in line for log in logs for line in log.splitlines())

    def _sockets(self, name: str) -> list[tuple[int, str]]:
        """Local port and state of each TCP socket of a process, from /proc."""
        pid = self.nodes.pid(name)
        links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()]
        inodes = {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return [(int(row[1].rpartition(":")[2], 16), row[3]) for row in rows if row[9] in inodes]

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def _get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", headers=self._headers, timeout=60, verify=NO_TLS)

    def _sum(self, name: str) -> float:
        lines = [line for line in self.metrics() if line.startswith(f"{name}{{")]
        assert lines, f"there is no metric {name}"
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def _is_idle(self) -> bool:
        page = self.metrics()
        busy = [name for name in ("running", "waiting") if any(_worker_values(page, name).values())]
        return not busy and _worker_values(page, "free_blocks") == _worker_values(page, "total_blocks")

    def _worker_lines(self) -> list[str]:
        return [
            line
            for line in self.metrics()
            if re.match(r"baton:(worker_)?\w*(up|running|waiting|blocks|requests)\{", line)
        ]

    def _for_tests(self, spec: ChildSpec) -> ChildSpec:
        """Replace a node by one for tests where the test asks for it."""
        spec = self._worker_for_tests(spec)
        return spec if self.relays is None else self.relays.route(spec)

    def _worker_for_tests(self, spec: ChildSpec) -> ChildSpec:
        program, _, _, _, *arguments = spec.argv  # python -P -m baton.ROLE ...
        if spec.group == "prefill" and self.cut_off_file is not None:
            cut_off = (program, "-P", "-m", "baton.testing.cut_off_worker", str(self.cut_off_file))
            return replace(spec, argv=(*cut_off, *arguments))
        step_s = {"prefill": self.prefill_step_s, "decode": self.decode_step_s}.get(spec.group, 0.0)
        if not step_s:
            return spec
        paced = (program, "-P", "-m", "baton.testing.paced_worker", spec.group, str(step_s))
        return replace(spec, argv=(*paced, *arguments))
