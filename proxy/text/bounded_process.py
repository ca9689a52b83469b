"""A child process that computes for requests what may loop or grow for ever, so that it harms no other request.

The kernel ends the child at its limit of processor time, whatever it is doing, and gives it no memory beyond its limit:
a bound inside Python could not stop `10 ** 10 ** 8`, nor a library in C. The parent starts another one for the next
request. Both ends of the connection are here: frames of JSON with a length before each; the first one says what all
others are about. Knows nothing of what is computed.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from baton.node.errors import BadRequest, BatonError, PeerLost, SettingsError

CPU_LIMIT_S = 2.0
"""Of the child, for one request. The longest that a request may have takes a tenth."""
MEMORY_LIMIT_BYTES = 512 << 20
"""Address space of the child; without a request it has a tenth, with the tokenizer of a large model a third."""
WALL_LIMIT_S = 30.0
"""For a child that gets no processor time."""
_EXIT_WAIT_S = 1.0
_LENGTH_BYTES = 4

Reply = dict[str, Any]
Handler = Callable[[Mapping[str, Any]], Reply]


@dataclass(frozen=True, slots=True)
class Subject:
    """How errors speak of what the child does."""

    name: str
    """Such as "the model's chat template"."""
    given: str
    """What it does it for, such as "these messages"."""
    param: str | None


class BoundedProcess:
    """Runs `module` as a child; any thread may call it, and waits for those before it."""

    def __init__(
        self, module: str, first: Mapping[str, Any], subject: Subject, cpu_limit_s: float = CPU_LIMIT_S
    ) -> None:
        self._module = module
        self._first = first
        self._subject = subject
        self._cpu_limit_s = cpu_limit_s
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[..., Any] | None = None

    def start(self) -> None:
        """Have the child ready before it is needed; raises as `ask`."""
        with self._lock:
            self._connected()

    def ask(self, request: Mapping[str, Any]) -> Reply:
        """The child's reply; BadRequest where it refuses, or exceeds its limits, PeerLost where it cannot run."""
        with self._lock:
            return self._exchange(self._connected(), request)

    def close(self) -> None:
        """End the child; `ask` would start another one. Does not wait for a request that is being computed."""
        if self._end is not None:
            self._end()

    def _connected(self) -> socket.socket:
        if self._connection is None or self._end is None or not self._end.alive:
            ours, theirs = socket.socketpair()
            ours.settimeout(WALL_LIMIT_S)
            command = [sys.executable, "-P", "-m", self._module, str(self._cpu_limit_s)]
            with theirs:
                self._process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL)
            self._connection = ours
            self._end = weakref.finalize(self, _end_process, self._process, ours)
            try:
                self._exchange(ours, self._first)
            except BatonError:
                self.close()
                raise
        return self._connection

    def _exchange(self, connection: socket.socket, request: Mapping[str, Any]) -> Reply:
        try:
            _send(connection, request)
            reply = _receive(connection)
        except TimeoutError:
            self.close()
            raise BadRequest(f"{self._subject.name} took longer than {WALL_LIMIT_S:.0f} s") from None
        except (OSError, EOFError):
            raise self._cause_of_end() from None
        if "error" in reply:
            raise BadRequest(reply["error"], param=reply["param"])
        return reply

    def _cause_of_end(self) -> BatonError:
        """The child is gone, or is killed here."""
        process, subject = self._process, self._subject
        assert process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_EXIT_WAIT_S)  # it has closed the connection, and may still be ending
        self.close()
        status = process.wait()
        if status == -signal.SIGPROF:
            limit = f"{self._cpu_limit_s:g} s"
            return BadRequest(f"{subject.name} did not end within {limit} for {subject.given}", param=subject.param)
        if status < 0:
            return BadRequest(f"the process of {subject.name} died of signal {-status}", param=subject.param)
        return PeerLost(f"the process of {subject.name} ended with status {status}")


def _end_process(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    """Kill the child, which holds nothing; a thread that waits for its answer then reads the end of the connection."""
    process.kill()
    process.wait()
    connection.close()


def _send(connection: socket.socket, value: object) -> None:
    data = json.dumps(value).encode()
    connection.sendall(len(data).to_bytes(_LENGTH_BYTES, "little") + data)


def _receive(connection: socket.socket) -> dict[str, Any]:
    """The next frame; EOFError where the other side has closed."""
    size = int.from_bytes(_read(connection, _LENGTH_BYTES), "little")
    value: dict[str, Any] = json.loads(_read(connection, size))
    return value


def _read(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def answer_requests(argv: Sequence[str], prepare: Callable[[Mapping[str, Any]], Handler]) -> int:
    """The child: answer frames until the parent closes, each within the limit of processor time.

    `prepare` makes what answers all others of the first one. Both may raise BadRequest or SettingsError.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, for the parent, which then closes
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    handler: Handler | None = None
    with socket.socket(fileno=sys.stdin.fileno()) as connection:
        while True:
            try:
                request = _receive(connection)
            except (EOFError, OSError):
                return 0
            signal.setitimer(signal.ITIMER_PROF, float(argv[0]))
            reply: Reply = {}
            try:
                if handler is None:
                    handler = prepare(request)
                else:
                    reply = handler(request)
            except (BadRequest, SettingsError) as error:
                reply = {"error": str(error), "param": getattr(error, "param", None)}
            _send(connection, reply)
            signal.setitimer(signal.ITIMER_PROF, 0)
