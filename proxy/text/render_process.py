"""A chat template in a process of its own, so that one that loops or grows for ever harms no other request.

The kernel ends the child at its limit of processor time, whatever it is doing, and gives it no memory beyond its limit;
a bound inside Python could not stop `10 ** 10 ** 8`. The parent starts another one for the next request. Both ends of
the connection are here: frames of JSON with a length before each; the first one is the template. Knows no tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import resource
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from baton.node.errors import BadRequest, BatonError, PeerLost, SettingsError
from baton.proxy.text.template import ChatTemplate, RenderOptions, check_template

CPU_LIMIT_S = 2.0
"""Of the child, for one conversation. The longest that a request may have takes a tenth."""
MEMORY_LIMIT_BYTES = 512 << 20
"""Address space of the child; without a conversation it has a tenth."""
MAX_TEXT_CHARS = 32 << 20
WALL_LIMIT_S = 30.0
"""For a child that gets no processor time."""
_EXIT_WAIT_S = 1.0
_LENGTH_BYTES = 4


class RenderProcess:
    """Renders one model's chat template; any thread may call it, and waits for those before it.

    Raises SettingsError where the source is no template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], cpu_limit_s: float = CPU_LIMIT_S) -> None:
        check_template(source)
        self._first = {"source": source, "special_tokens": dict(special_tokens)}
        self._cpu_limit_s = cpu_limit_s
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[..., Any] | None = None

    def start(self) -> None:
        """Have the template compiled before it is needed; raises as `render`."""
        with self._lock:
            self._connected()

    def render(self, messages: Sequence[Mapping[str, Any]], options: RenderOptions) -> str:
        """As `ChatTemplate.render`; BadRequest also where the template exceeds its limits, or cannot be compiled."""
        request = {"messages": [dict(message) for message in messages], "options": dataclasses.asdict(options)}
        with self._lock:
            return self._ask(self._connected(), request)

    def close(self) -> None:
        """End the child; `render` would start another one. Does not wait for a conversation that is being rendered."""
        if self._end is not None:
            self._end()

    def _connected(self) -> socket.socket:
        if self._connection is None or self._end is None or not self._end.alive:
            ours, theirs = socket.socketpair()
            ours.settimeout(WALL_LIMIT_S)
            command = [sys.executable, "-P", "-m", __name__, str(self._cpu_limit_s)]
            with theirs:
                self._process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL)
            self._connection = ours
            self._end = weakref.finalize(self, _end_process, self._process, ours)
            try:
                self._ask(ours, self._first)
            except BatonError:
                self.close()
                raise
        return self._connection

    def _ask(self, connection: socket.socket, request: object) -> str:
        try:
            _send(connection, request)
            reply = _receive(connection)
        except TimeoutError:
            self.close()
            raise BadRequest(f"the model's chat template took longer than {WALL_LIMIT_S:.0f} s") from None
        except (OSError, EOFError):
            raise self._cause_of_end() from None
        if "text" not in reply:
            raise BadRequest(reply["error"], param=reply["param"])
        return str(reply["text"])

    def _cause_of_end(self) -> BatonError:
        """The child is gone, or is killed here."""
        process = self._process
        assert process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_EXIT_WAIT_S)  # it has closed the connection, and may still be ending
        self.close()
        status = process.wait()
        if status == -signal.SIGPROF:
            return BadRequest(
                f"the model's chat template did not end within {self._cpu_limit_s:g} s for these messages",
                param="messages",
            )
        if status < 0:
            return BadRequest(f"the process of the model's chat template died of signal {-status}", param="messages")
        return PeerLost(f"the process that renders chat templates ended with status {status}")


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


# ---- the child ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Answer frames until the parent closes; each within the limit of processor time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, for the parent, which then closes
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    template: ChatTemplate | None = None
    with socket.socket(fileno=sys.stdin.fileno()) as connection:
        while True:
            try:
                request = _receive(connection)
            except (EOFError, OSError):
                return 0
            signal.setitimer(signal.ITIMER_PROF, float(argv[0]))
            try:
                if template is None:
                    template = ChatTemplate(request["source"], request["special_tokens"])
                    reply: dict[str, Any] = {"text": ""}
                else:
                    reply = {"text": _rendered(template, request)}
            except (BadRequest, SettingsError) as error:
                reply = {"error": str(error), "param": getattr(error, "param", None)}
            _send(connection, reply)
            signal.setitimer(signal.ITIMER_PROF, 0)


def _rendered(template: ChatTemplate, request: Mapping[str, Any]) -> str:
    text = template.render(request["messages"], RenderOptions(**request["options"]))
    if len(text) > MAX_TEXT_CHARS:
        raise BadRequest("the model's chat template makes too long a prompt of these messages", param="messages")
    return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
