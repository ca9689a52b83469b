"""How the two ranks of a communicator find each other without a TCPStore: a torch Store of two processes, tunnelled.

What one end sets is sent to the other by a function that is passed in (the plane's own channel behind it), so no port
is opened for it. One store serves one communicator and is thrown away with it: keys are never used twice.
Source: torch.distributed.Store, whose Python subclasses c10d calls back (torch/csrc/distributed/c10d/init.cpp).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

MAX_KEYS = 256
MAX_VALUE_BYTES = 65_536


class TunnelStore(dist.Store):  # type: ignore[name-defined, misc]
    """One end. `put(key, value)` must reach the other end's `deliver`; both may be called by any thread.

    Its maker keeps a reference for as long as a process group uses it: c10d holds the C++ half only.
    """

    def __init__(self, put: Callable[[str, bytes], None], timeout_s: float) -> None:
        super().__init__()
        self._put = put
        self._timeout_s = timeout_s
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._closed = False

    def deliver(self, key: str, value: bytes) -> None:
        """The peer has set a key. Beyond MAX_KEYS it is dropped, as a peer must not fill our memory."""
        with self._changed:
            if key in self._values or len(self._values) < MAX_KEYS:
                self._values[key] = value
                self._changed.notify_all()

    def shut(self) -> None:
        """All waiting calls fail at once."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # -- called by c10d

    def set(self, key: str, value: bytes | str) -> None:
        data = value.encode() if isinstance(value, str) else bytes(value)
        if len(data) > MAX_VALUE_BYTES:
            raise ValueError(f"{len(data)} bytes for the rendezvous of two ranks")
        self.deliver(key, data)
        self._put(key, data)

    def get(self, key: str) -> bytes:
        self.wait([key])
        with self._changed:
            return self._values[key]

    def add(self, key: str, amount: int) -> int:
        """A counter of this end alone: two ranks that find each other need none, and it is not sent."""
        with self._changed:
            value = int(self._values.get(key, b"0")) + amount
            self._values[key] = str(value).encode()
            self._changed.notify_all()
            return value

    def check(self, keys: list[str]) -> bool:
        with self._changed:
            return all(key in self._values for key in keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Raises TimeoutError if they are not all there in time, or when the store is shut."""
        deadline = time.monotonic() + min(self._timeout_s, timeout.total_seconds() if timeout else self._timeout_s)
        with self._changed:
            while not all(key in self._values for key in keys):
                if self._closed or not self._changed.wait(max(deadline - time.monotonic(), 0.0)):
                    raise TimeoutError(f"no peer set {keys}")

    def delete_key(self, key: str) -> bool:
        with self._changed:
            return self._values.pop(key, None) is not None

    def num_keys(self) -> int:
        with self._changed:
            return len(self._values)

    def set_timeout(self, timeout: timedelta) -> None:
        """Ignored: the bound is the plane's."""

    def clone(self) -> TunnelStore:
        return self
