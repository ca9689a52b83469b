"""A cluster on this machine as one object: starts the nodes that `serve` would run, and controls each of them.

    with Cluster(ServeSettings(prefill=2, decode=2, device="cpu")) as cluster:
        cluster.kill("decode-0")
        cluster.restart("prefill-1")
        requests go to cluster.url

Tests, benchmarks and offline use start clusters with it. It owns the processes from start to end and knows no request:
what is sent to `url` is the caller's. Ports are free ones of the loopback interface. Nodes lead process groups of their
own, so that Ctrl-C reaches only the caller; on Linux the kernel ends them when the caller is killed. Make a Cluster in
a thread that outlives it: Linux counts the end of the thread that started a child as the death of its parent.
"""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol, Self

from baton.launch.gpus import describe, visible_gpus
from baton.launch.local import (
    Ports,
    ServeSettings,
    free_port,
    node_environment,
    place_workers,
    plan_nodes,
    plan_worker,
    scheme,
    served_name,
    sizes_pools,
)
from baton.launch.run_folder import RunFolder
from baton.launch.supervisor import ChildSpec, signal_group, tether
from baton.node.api_settings import api_keys
from baton.node.local_http import proxy_socket
from baton.node.private_files import private_opener
from baton.node.tls import own_server_context

HTTP_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
POLL_S = 0.05
TAIL_BYTES = 4000
_READY = re.compile(r'baton:worker_up\{(?=.*role="(\w+)")(?=.*state="ready")(?=.*worker="([^"]+)").*\} 1\.0')


class NodeProcess(Protocol):
    """What a cluster uses of subprocess.Popen."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, sig: int) -> None: ...


def start_process(spec: ChildSpec, log: BinaryIO) -> NodeProcess:
    """Start a node: a child that leads a process group of its own and ends with the caller."""
    return subprocess.Popen(
        spec.argv,
        env=spec.env,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        process_group=0,
        preexec_fn=tether(os.getpid()),
    )


class ClusterError(Exception):
    """A cluster did not start, or a node ended that should run; the message ends with the last lines of its log."""


class Cluster:
    """The nodes of one cluster by name: proxy (proxy-0, proxy-1 if there are several), store, prefill-0, decode-0 and
    so on. See the example above.

    `edit` may change the command of a node, and `start` how it is started. Logs are files `NAME.log` in `log_folder`,
    by default a temporary one that is removed at the end. `environ` stands in for the environment of this process.
    """

    def __init__(
        self,
        settings: ServeSettings,
        *,
        log_folder: Path | None = None,
        edit: Callable[[ChildSpec], ChildSpec] = lambda spec: spec,
        start: Callable[[ChildSpec, BinaryIO], NodeProcess] = start_process,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = RunFolder()
        self.settings = replace(settings, host="127.0.0.1", port=free_port())
        self.ports = Ports.free(settings, self._folder)
        self.model = served_name(settings)
        """The name of the model in requests."""
        environ = os.environ if environ is None else environ
        gpus = visible_gpus(environ) if settings.device != "cpu" else []
        placements = place_workers(settings, len(gpus))
        self.gpu_lines = describe(placements, gpus, sizes_pools(settings))
        """What each worker may use of a GPU, to be printed."""
        self._edit = edit
        self._start = start
        self._env = node_environment(settings, environ)
        specs = plan_nodes(self.settings, self.ports, placements, environ)
        self._specs = {spec.name: edit(spec) for spec in specs}
        self._proxies = [spec.name for spec in specs if spec.group == "proxy"]
        self._log_folder = self._folder.path if log_folder is None else log_folder
        self._nodes: dict[str, NodeProcess] = {}
        self._stopping: set[str] = set()
        """Nodes that may end: they got a signal from here, or their end is waited for."""
        self._killed: set[str] = set()

    @property
    def port(self) -> int:
        return self.settings.port

    @property
    def url(self) -> str:
        return f"{scheme(self.settings)}://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- the whole

    def start(self) -> float:
        """Start all nodes and wait for the first token; returns the seconds it took. On failure nothing is left."""
        begin = time.monotonic()
        try:
            for name in self._specs:
                self.start_node(name)
            self.wait_ready()
        except BaseException:
            self.kill_all()
            raise
        return time.monotonic() - begin

    def wait_ready(self, workers: int | None = None) -> None:
        """Until so many workers (default: all that run) have joined, the store too, and a token comes through each
        proxy that runs."""
        running = set(self.running()) - set(self._proxies)
        wanted = len(running - {"store"}) if workers is None else workers

        def joined() -> bool:
            ready = self.members()
            return len(ready - {"store"}) >= wanted and ("store" not in running or "store" in ready)

        self.wait_until(joined, f"{wanted} workers that have joined", self.settings.start_timeout_s)
        for proxy in self._running_proxies():
            self.wait_until(
                lambda proxy=proxy: self.get("/health_generate", proxy)[0] == 200,  # type: ignore[misc]
                "the first token",
                self.settings.start_timeout_s,
            )

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> dict[str, int]:
        """SIGTERM to all, proxies last; returns the exit status of each that did not end with 0.

        A node that does not end in time is killed, and counts; one that `kill` has ended does not.
        """
        bad: dict[str, int] = {}
        for name in sorted(self.running(), key=lambda name: name in self._proxies):
            self.signal(name, signal.SIGCONT)
            self.signal(name, signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        for name, node in self._nodes.items():
            try:
                node.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._reap(node)
            if node.returncode and name not in self._killed:
                bad[name] = node.returncode
        self._folder.close()
        return bad

    def kill_all(self) -> None:
        """SIGKILL to all; for a way out that must not wait."""
        for node in self._nodes.values():
            self._reap(node)
        self._folder.close()

    # -- one node

    def running(self) -> list[str]:
        """Names of the nodes that run."""
        return [name for name, node in self._nodes.items() if node.poll() is None]

    def names(self) -> list[str]:
        """Names of all nodes that have been started."""
        return list(self._nodes)

    def pid(self, name: str) -> int:
        return self._nodes[name].pid

    def start_node(self, name: str, *more: str) -> None:
        """Start a planned node (again), with `more` arguments from now on; does not wait until it has joined."""
        spec = self._specs[name]
        spec = self._specs[name] = replace(spec, argv=(*spec.argv, *more))
        self._stopping.discard(name)
        self._killed.discard(name)
        with open(self._log_folder / f"{name}.log", "ab", opener=private_opener) as log:
            self._nodes[name] = self._start(spec, log)

    def add_worker(self, role: str, name: str, *more: str) -> None:
        """Start one more worker, on no GPU of its own (`more` may say --gpu); does not wait until it has joined."""
        self._specs[name] = self._edit(plan_worker(self.settings, self.ports, role, name, None, self._env))
        self.start_node(name, *more)

    def forget(self, name: str) -> None:
        """Of a node that has ended: it does not count any more."""
        assert self._nodes[name].poll() is not None, f"{name} runs"
        del self._nodes[name], self._specs[name]

    def restart(self, name: str, *more: str) -> None:
        """Kill a worker or the store, start it again with `more` arguments, and wait until the cluster is ready."""
        self.kill(name)
        self.wait_until(lambda: name not in self.members(), f"{name} gone", self.settings.start_timeout_s)
        self.start_node(name, *more)
        self.wait_until(lambda: name in self.members(), f"{name} again", self.settings.start_timeout_s)
        self.wait_ready()

    def revive(self) -> None:
        """Start again all nodes that have ended, and wait until the cluster is as it was at its start."""
        ended = [name for name in self._specs if name not in self.running()]
        if not set(self._proxies) & set(ended):
            self.wait_until(lambda: not self.members() & set(ended), f"{ended} gone", self.settings.start_timeout_s)
        for name in ended:
            self.start_node(name)
        wanted = set(self._specs) - set(self._proxies)
        self.wait_until(lambda: wanted <= self.members(), "all members again", self.settings.start_timeout_s)
        self.wait_ready()

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a node, which may end it."""
        if number not in (signal.SIGSTOP, signal.SIGCONT):
            self._stopping.add(name)
        self._nodes[name].send_signal(number)

    def freeze(self, name: str) -> None:
        """Stop a node as a hanging machine would: its connections stay open."""
        self.signal(name, signal.SIGSTOP)

    def resume(self, name: str) -> None:
        self.signal(name, signal.SIGCONT)

    def kill(self, name: str) -> None:
        """SIGKILL to the node and its children, and wait until it is gone."""
        self._stopping.add(name)
        self._killed.add(name)
        self._reap(self._nodes[name])

    def wait_end(self, name: str, timeout_s: float) -> int:
        """The exit status of a node that ends by itself."""
        self._stopping.add(name)
        return self._nodes[name].wait(timeout_s)

    def log(self, name: str) -> str:
        """What a node has printed so far, over all its restarts."""
        return (self._log_folder / f"{name}.log").read_text(errors="replace")

    # -- what the proxy says

    def get(self, path: str, proxy: str = "") -> tuple[int, str]:
        """Status and body of GET `path`, with the API key; status 0 where no answer came. Of several proxies, one may
        be named, which then shows its own metrics only."""
        connection = self._connection(proxy)
        key = {"Authorization": f"Bearer {keys[0]}"} if (keys := api_keys(self.settings)) else {}
        try:
            connection.request("GET", path, headers=key)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        except (OSError, http.client.HTTPException):
            return 0, ""
        finally:
            connection.close()

    def members(self) -> set[str]:
        """Names of the workers and stores that every proxy that runs counts as ready."""
        pages = [self.get("/metrics", proxy)[1] for proxy in self._running_proxies()]
        ready = [{found[2] for line in page.splitlines() if (found := _READY.fullmatch(line))} for page in pages]
        return set.intersection(*ready) if ready else set()

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Poll until `condition` holds. ClusterError if it does not in time, or a node ends that should run."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            ended = [
                name for name, node in self._nodes.items() if node.poll() is not None and name not in self._stopping
            ]
            if ended or time.monotonic() > deadline:
                why = f"{ended[0]} has ended" if ended else f"not within {timeout_s:g} s"
                raise ClusterError(f"{what}: {why}\n" + "\n".join(map(self._log_tail, ended or self.running())))
            time.sleep(POLL_S)

    # -- inside

    def _running_proxies(self) -> list[str]:
        return [name for name in self.running() if name in self._proxies]

    def _connection(self, proxy: str) -> http.client.HTTPConnection:
        if not proxy or self.ports.group_folder is None:
            if self.settings.tls_cert is None:
                return http.client.HTTPConnection("127.0.0.1", self.port, timeout=HTTP_TIMEOUT_S)
            context = own_server_context()
            return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=HTTP_TIMEOUT_S, context=context)
        return _UnixConnection(proxy_socket(self.ports.group_folder, self._proxies.index(proxy)))

    def _log_tail(self, name: str) -> str:
        return f"--- {name}\n" + (self._log_folder / f"{name}.log").read_bytes()[-TAIL_BYTES:].decode(errors="replace")

    def _reap(self, node: NodeProcess) -> None:
        signal_group(node.pid, signal.SIGKILL)
        node.wait(STOP_TIMEOUT_S)


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("proxy", timeout=HTTP_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
