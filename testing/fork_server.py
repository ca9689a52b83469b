"""Starts nodes as forks of a process that has imported what they need, so that a start takes a tenth of the time.

    server = ForkServer()
    Cluster(settings, start=server.start)     # instead of launch.cluster.start_process

The server is `python -m baton.testing.fork_server PROGRAM ...`, one thread, which opens nothing before it forks. A node
runs the module of its command line as `__main__`, in its own process group, with its own environment and log. It
differs from a process of its own in /proc/PID/cmdline and /proc/PID/environ, which are the server's, and in its end:
after its threads and all of `atexit` the interpreter is not torn down, which would copy what is shared with the server.
For Linux: there the kernel also kills the nodes when the server dies, and the server when the thread that made it ends.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import BinaryIO

from baton.launch.supervisor import ChildSpec, tether

PROGRAMS = ("baton.prefill", "baton.decode", "baton.proxy", "baton.kvtransfer")
MAX_REQUEST_BYTES = 1 << 18
START_TIMEOUT_S = 120.0
"""The first start waits for the imports, on a machine that may be busy."""


class ForkedNode:
    """A node, with what subprocess.Popen has of it."""

    def __init__(self, pid: int, status: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._status = status
        """Where the server writes the exit status."""

    def poll(self) -> int | None:
        return self._read_status(0.0)

    def wait(self, timeout: float | None = None) -> int:
        status = self._read_status(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(f"forked node {self.pid}", timeout or 0.0)
        return status

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def _read_status(self, timeout_s: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout_s)[0]:
            written = os.read(self._status, 16)
            self.returncode = int(written) if written else -signal.SIGKILL  # the kernel killed it with the server
            os.close(self._status)
        return self.returncode


class ForkServer:
    """The server, as the process that wants nodes has it. It imports `programs`; others are run all the same."""

    def __init__(self, programs: Sequence[str] = PROGRAMS) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._requests.settimeout(START_TIMEOUT_S)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "baton.testing.fork_server", *programs],
                stdin=theirs.fileno(),
                process_group=0,
                preexec_fn=tether(os.getpid()),
            )
        atexit.register(self.close)

    def start(self, spec: ChildSpec, log: BinaryIO) -> ForkedNode:
        """Start `python -P -m MODULE ...`; does not wait for anything that it does."""
        _, _, _, module, *arguments = spec.argv
        assert spec.argv[1:3] == ("-P", "-m"), spec.argv
        request = {"module": module, "arguments": arguments, "environ": dict(spec.env)}
        mine, theirs = os.pipe()
        try:
            socket.send_fds(self._requests, [json.dumps(request).encode()], [log.fileno(), theirs])
        finally:
            os.close(theirs)
        return ForkedNode(int(self._requests.recv(16)), mine)

    def close(self) -> None:
        """End the server, and all nodes with it."""
        self._requests.close()
        self._process.wait(START_TIMEOUT_S)


def serve_until_forked(requests: socket.socket) -> tuple[str, list[str]] | None:
    """Fork a node for each request. Returns in each node with its module and arguments; at the end in the server."""
    wake_up, woken = socket.socketpair()
    woken.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    statuses: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([requests, wake_up], [], [])
        if wake_up in ready:
            wake_up.recv(4096)
            _report_ended(statuses)
        if requests in ready:
            request, passed, _, _ = socket.recv_fds(requests, MAX_REQUEST_BYTES, 2)
            if not request:
                return None
            log, status = passed
            server = os.getpid()
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for each in (*statuses.values(), status):
                    os.close(each)
                return _become_node(json.loads(request), log, server)
            os.close(log)
            statuses[pid] = status
            _lead_group(pid)  # here too: the node may be killed by its group before it runs
            requests.send(str(pid).encode())


def _report_ended(statuses: dict[int, int]) -> None:
    """Write the exit status of each node that has ended, as Popen has it."""
    for pid, pipe in list(statuses.items()):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            os.write(pipe, str(os.waitstatus_to_exitcode(status)).encode())
            os.close(pipe)
            del statuses[pid]


def _lead_group(pid: int) -> None:
    try:
        os.setpgid(pid, pid)
    except ProcessLookupError:
        pass  # it has ended


def _become_node(request: dict[str, object], log: int, server: int) -> tuple[str, list[str]]:
    """What Popen does between fork and exec; stdin, the requests, becomes empty."""
    _lead_group(0)
    if (tie := tether(server)) is not None:
        tie()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for own, standard in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(own, standard)
    os.close(nothing)
    os.close(log)
    environ, arguments = request["environ"], request["arguments"]
    assert isinstance(environ, dict) and isinstance(arguments, list)
    os.environ.clear()
    os.environ.update(environ)
    return str(request["module"]), arguments


def _leave(statuses: list[int]) -> None:
    """End the process, if it ends by itself; called after all else that is registered with `atexit`."""
    if statuses:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(statuses[0])


def _run(module: str, statuses: list[int]) -> None:
    """Run a node; adds its exit status unless an exception ends it, which is left to the interpreter."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            statuses.append(end.code or 0)
        raise
    statuses.append(0)


def main() -> None:
    statuses: list[int] = []
    atexit.register(_leave, statuses)
    for program in sys.argv[1:]:
        importlib.import_module(f"{program}.__main__")
        del sys.modules[f"{program}.__main__"]  # a node runs it anew
    gc.collect()
    gc.freeze()  # the collector of a node does not touch, and so copy, what is shared
    with socket.socket(fileno=os.dup(0)) as requests:
        node = serve_until_forked(requests)
    if node is not None:
        module, sys.argv[1:] = node
        _run(module, statuses)


if __name__ == "__main__":
    main()
