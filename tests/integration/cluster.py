"""Real processes on this machine for the integration tests: a proxy and any number of workers, killed and cleaned up.

    with Cluster(prefill=2, decode=2) as cluster:
        cluster.complete("Once upon a time", max_tokens=8)
        cluster.kill("d0")

Every wait is bounded. On leaving, all processes must end by themselves within their drain time (a worker that holds on
to a block fails `check()` and so its exit status), unless the test killed them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

ROOT = Path(__file__).resolve().parents[2]
_WORKER_LINE = re.compile(r'baton:worker_(?P<name>\w+)\{role="(?P<role>\w+)",worker="(?P<worker>\w+)"\} (?P<value>\S+)')
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Stream:
    """One streamed completion, read by a thread: what has come so far, and how it ended."""

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
        """Wait for its end."""
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


@dataclass(slots=True)
class Cluster:
    """See the module's docstring. Workers are called p0, p1, ... and d0, d1, ..., the store, if there is one, store."""

    prefill: int = 1
    decode: int = 1
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
    api_key: str = ""
    """The one that the proxy asks for; empty: none."""
    log_folder: Path | None = None
    http_port: int = field(default_factory=free_port)
    control_port: int = field(default_factory=free_port)
    store_port: int = field(default_factory=free_port)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    killed: set[str] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def __enter__(self) -> Self:
        try:
            self.start_proxy()
            if self.store_args is not None:
                self.start_store(*self.store_args)
            for number in range(self.prefill):
                self.start_worker("prefill", f"p{number}")
            for number in range(self.decode):
                self.start_worker("decode", f"d{number}")
            self.wait_ready(self.prefill + self.decode)
        except BaseException:
            self._kill_all()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._kill_all()
            return
        bad = self.stop()
        assert not bad, f"these did not end cleanly: {bad}"

    # -- processes

    def start_proxy(self) -> None:
        self.killed.discard("proxy")
        self._spawn(
            "proxy",
            "proxy",
            "--model",
            self.model,
            "--port",
            str(self.http_port),
            "--control-address",
            f"tcp://127.0.0.1:{self.control_port}",
            *(("--api-key", self.api_key) if self.api_key else ()),
            *self.proxy_args,
        )

    def start_store(self, *arguments: str) -> None:
        self.killed.discard("store")
        control, bind = f"tcp://127.0.0.1:{self.control_port}", f"tcp://127.0.0.1:{self.store_port}"
        self._spawn("store", "kvtransfer", "--store-id", "store", "--proxy", control, "--bind", bind, *arguments)

    def start_worker(self, role: str, name: str, *extra: str) -> None:
        own = self.prefill_args if role == "prefill" else self.decode_args
        step_s = self.prefill_step_s if role == "prefill" else self.decode_step_s
        self.killed.discard(name)
        self._spawn(
            name,
            *(("testing.paced_worker", role, str(step_s)) if step_s else (role,)),
            "--model",
            self.model,
            "--proxy",
            f"tcp://127.0.0.1:{self.control_port}",
            "--worker-id",
            name,
            "--device",
            "cpu",
            "--drain-s",
            "10",
            *(("--store", f"tcp://127.0.0.1:{self.store_port}") if self.store_args is not None else ()),
            *self.worker_args,
            *own,
            *extra,
        )

    def revive(self) -> None:
        """Start again what has ended, and wait until the cluster is as it was at the beginning."""
        names = [*(f"p{n}" for n in range(self.prefill)), *(f"d{n}" for n in range(self.decode))]
        for name in ("proxy", *names):
            if self.processes[name].poll() is None:
                continue
            if name == "proxy":
                self.start_proxy()
            else:
                self.start_worker("prefill" if name.startswith("p") else "decode", name)
        self.wait_ready(len(names))
        self.wait_workers(*names)

    def signal(self, name: str, number: signal.Signals) -> None:
        self.processes[name].send_signal(number)

    def kill(self, name: str) -> None:
        """SIGKILL, and wait until it is gone."""
        self.killed.add(name)
        self.processes[name].kill()
        self.processes[name].wait(STOP_TIMEOUT_S)

    def stop(self) -> dict[str, int]:
        """SIGTERM to all, workers first; returns the exit status of those that did not end with 0."""
        workers = [name for name in self.processes if name != "proxy"]
        for name in [*workers, "proxy"]:
            process = self.processes[name]
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        bad: dict[str, int] = {}
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for name, process in self.processes.items():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_TIMEOUT_S)
            if process.returncode != 0 and name not in self.killed:
                bad[name] = process.returncode
        return bad

    def wait_ready(self, workers: int) -> None:
        """Until so many workers have joined and a token comes through."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            for name, process in self.processes.items():
                assert process.poll() is None or name in self.killed, f"{name} ended with {process.returncode}"
            try:
                if self.num_workers() >= workers and self._get("/health_generate").is_success:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"the cluster is not ready after {START_TIMEOUT_S} s")

    def num_workers(self) -> int:
        """Live workers, as the proxy's metrics count them."""
        lines = [line for line in self.metrics() if line.startswith("baton:worker_up{") and line.endswith(" 1.0")]
        return len([line for line in lines if 'role="store"' not in line])

    def metrics(self) -> list[str]:
        return self._get("/metrics").text.splitlines()

    def worker_values(self, name: str) -> dict[str, float]:
        """A number that every live worker reports, such as "running", by worker."""
        return {line["worker"]: float(line["value"]) for line in self._reports(name) if line["role"] != "store"}

    def store_value(self, name: str) -> float:
        """A number that the host's store reports; 0 while it does not."""
        lines = [line for line in self.metrics() if line.startswith(f"baton:store_{name}{{")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def counter(self, name: str) -> float:
        """A counter of the proxy's engine, such as "retries"."""
        return self._sum(f"baton:{name}_total")

    def gauge(self, name: str) -> float:
        """A gauge of the proxy's engine, such as "queued_requests"."""
        return self._sum(f"baton:{name}")

    def queued(self) -> float:
        """Requests that wait in the proxy for a worker."""
        return self.gauge("queued_requests")

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
        """Poll until `condition` holds; `what` says what was waited for."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s\n" + "\n".join(self._worker_lines())
            time.sleep(0.02)

    def wait_workers(self, *names: str, timeout_s: float = START_TIMEOUT_S) -> None:
        """Until exactly these workers are members."""
        self.wait_until(lambda: set(self.worker_values("running")) == set(names), f"members {names}", timeout_s)

    def wait_idle(self, timeout_s: float = 30.0) -> None:
        """Until no worker has work, and every block of each is free or cached."""
        self.wait_until(self._is_idle, "idle workers that hold no block", timeout_s)

    def wait_end(self, name: str, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """The exit status of a process that ends by itself."""
        return self.processes[name].wait(timeout_s)

    def log(self, name: str) -> str:
        """What a process has logged so far, in all its lives."""
        assert self.log_folder is not None
        return (self.log_folder / f"{name}.log").read_text(errors="replace")

    def ports(self, name: str) -> list[int]:
        """The TCP ports that a process listens on, as Linux tells."""
        pid = self.processes[name].pid
        links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()]
        inodes = {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return sorted(int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and row[9] in inodes)

    # -- requests

    def complete(self, prompt: str | list[int], **body: Any) -> dict[str, Any]:
        """One non-streaming completion; greedy unless the body says otherwise."""
        payload = {"model": self.model_name, "prompt": prompt, "temperature": 0, **body}
        answer = httpx.post(f"{self.url}/v1/completions", json=payload, headers=self._headers, timeout=120)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def stream(self, prompt: str | list[int], **body: Any) -> Iterator[dict[str, Any]]:
        """The chunks of one streamed completion, as they come."""
        payload = {"model": self.model_name, "prompt": prompt, "temperature": 0, "stream": True, **body}
        with httpx.stream(
            "POST", f"{self.url}/v1/completions", json=payload, headers=self._headers, timeout=120
        ) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield json.loads(line.removeprefix("data: "))

    def begin(self, prompt: str, **body: Any) -> Stream:
        """A streamed completion that is read in a thread of its own."""
        return Stream(self.stream(prompt, **body))

    @property
    def model_name(self) -> str:
        return Path(self.model).name

    # -- inside

    def _reports(self, name: str) -> list[re.Match[str]]:
        found = (_WORKER_LINE.fullmatch(line) for line in self.metrics())
        return [match for match in found if match and match["name"] == name]

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def _get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", headers=self._headers, timeout=10)

    def _sum(self, name: str) -> float:
        lines = [line for line in self.metrics() if line.startswith(f"{name}{{")]
        assert lines, f"there is no metric {name}"
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def _is_idle(self) -> bool:
        busy = [name for name in ("running", "waiting") if any(self.worker_values(name).values())]
        return not busy and self.worker_values("free_blocks") == self.worker_values("total_blocks")

    def _worker_lines(self) -> list[str]:
        return [
            line
            for line in self.metrics()
            if re.match(r"baton:(worker_)?\w*(up|running|waiting|blocks|requests)\{", line)
        ]

    def _spawn(self, name: str, module: str, *arguments: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        log = subprocess.DEVNULL if self.log_folder is None else (self.log_folder / f"{name}.log").open("ab")
        self.processes[name] = subprocess.Popen(
            [sys.executable, "-P", "-m", f"baton.{module}", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
        )
        if self.log_folder is not None:
            log.close()  # type: ignore[union-attr]

    def _kill_all(self) -> None:
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.wait(STOP_TIMEOUT_S)
