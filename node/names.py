"""Looks up the host names of links in threads of their own, so that no link waits for the name of another.

libzmq can connect to names, but looks them up in the one thread that moves the bytes of all links: where a name server
does not answer, every link of the process stands still for 20 s, and its peers take it for dead. So links are dialed by
number.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

from baton.node.addresses import host_of, in_address


def numbers_of(address: str) -> tuple[str, ...]:
    """The addresses, with numbers as hosts, that an address with a name stands for, the system's first choice first."""
    port = address.rpartition(":")[2]
    try:
        found = socket.getaddrinfo(host_of(address), int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return ()
    return tuple(dict.fromkeys(f"tcp://{in_address(str(each[4][0]))}:{port}" for each in found))


class NameLookup:
    """Looks one address up, again and again. One thread owns it; the threads that look up end by themselves."""

    def __init__(self, address: str, numbers: Callable[[str], tuple[str, ...]] = numbers_of) -> None:
        self._address = address
        self._numbers = numbers
        self._found: tuple[str, ...] = ()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Look up, unless that is going on: a name server may take its time."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="lookup", daemon=True)
            self._thread.start()

    def take(self) -> tuple[str, ...]:
        """What was found since the last call."""
        found, self._found = self._found, ()
        return found

    def _run(self) -> None:
        self._found = self._numbers(self._address)
