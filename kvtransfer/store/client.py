"""The thread of a worker that talks to the host's store and copies, so that no step of the model ever waits for it.

It owns its endpoint and its session. The worker's loop calls the methods of `Store`; what comes of them is delivered
as events. `NoStore` is for workers without one.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from baton.kvtransfer.blocks.copies import Copies
from baton.kvtransfer.store.events import StoreClientDied, StoreEvent
from baton.kvtransfer.store.session import StoreSession
from baton.node.counters import StoreClientCounters
from baton.node.endpoint import Endpoint
from baton.node.leg import LegKey
from baton.node.messages.store import decode_store
from baton.node.sockets import Context

LINK = "store"
MAX_WAIT_S = 0.05
STOP_TIMEOUT_S = 5.0

Command = Callable[[StoreSession, float], None]
Deliver = Callable[[StoreEvent], None]


class Store(Protocol):
    """What a worker's loop may ask of the store. See StoreSession for each."""

    @property
    def attached(self) -> bool:
        """Whether it is worth asking; may be out of date."""
        ...

    def lookup(self, key: LegKey, hashes: Sequence[bytes], first: int) -> None: ...

    def load(self, key: LegKey, skip: int, blocks: Sequence[int]) -> None: ...

    def stop(self, key: LegKey) -> None: ...

    def put(self, key: bytes, hashes: Sequence[bytes], blocks: Sequence[int]) -> None: ...

    def touch(self, hashes: Sequence[bytes]) -> None: ...

    @property
    def counters(self) -> StoreClientCounters | None:
        """Of this worker's use of it; None where there is no store."""
        ...

    def close(self) -> None: ...


class NoStore:
    """There is no store: it is never attached, so it must not be asked for anything."""

    attached = False

    def lookup(self, key: LegKey, hashes: Sequence[bytes], first: int) -> None: ...

    def load(self, key: LegKey, skip: int, blocks: Sequence[int]) -> None: ...

    def stop(self, key: LegKey) -> None: ...

    def put(self, key: bytes, hashes: Sequence[bytes], blocks: Sequence[int]) -> None: ...

    def touch(self, hashes: Sequence[bytes]) -> None: ...

    counters = None

    def close(self) -> None: ...


NO_STORE: Store = NoStore()


class StoreClient:
    """The store at `address`, whose worker is called `identity`.

    From its own thread it calls `deliver` with each event, and `on_store` with the identity of the store that it
    attaches to, "" while there is none.
    """

    def __init__(
        self,
        context: Context,
        identity: str,
        address: str,
        namespace: bytes,
        copies: Copies,
        deliver: Deliver,
        on_store: Callable[[str], None],
    ) -> None:
        self._endpoint = Endpoint(context, identity, None, decode_store)
        self._endpoint.connect(LINK, address, "store")
        self._deliver = deliver
        self._on_store = on_store
        self._announced_store = ""
        self._session = StoreSession(namespace, copies, lambda message: self._endpoint.send(LINK, message), deliver)
        self._todo: deque[Command] = deque()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    @property
    def attached(self) -> bool:
        return self._session.attached

    def lookup(self, key: LegKey, hashes: Sequence[bytes], first: int) -> None:
        self._do(lambda session, now: session.lookup(key, hashes, first, now))

    def load(self, key: LegKey, skip: int, blocks: Sequence[int]) -> None:
        self._do(lambda session, now: session.load(key, skip, blocks, now))

    def stop(self, key: LegKey) -> None:
        self._do(lambda session, now: session.stop(key, now))

    def put(self, key: bytes, hashes: Sequence[bytes], blocks: Sequence[int]) -> None:
        self._do(lambda session, now: session.put(key, hashes, blocks, now))

    def touch(self, hashes: Sequence[bytes]) -> None:
        self._do(lambda session, now: session.touch(hashes))

    @property
    def counters(self) -> StoreClientCounters:
        return self._session.counters

    def close(self) -> None:
        """End the thread; the store notices the silence."""
        self._stopping.set()
        self._endpoint.wake()
        self._thread.join(STOP_TIMEOUT_S)

    # -- the thread

    def _do(self, command: Command) -> None:
        self._todo.append(command)
        self._endpoint.wake()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._turn()
        except BaseException as error:  # whatever it is, the worker's loop must hear of it
            self._deliver(StoreClientDied(error))
        finally:
            self._session.close()
            self._endpoint.close()

    def _turn(self) -> None:
        wake_at = self._session.tick(time.monotonic())
        wait_s = min(max(wake_at - time.monotonic(), 0.0), MAX_WAIT_S, self._session.poll_s)
        inbound = self._endpoint.receive(0.0 if self._todo else wait_s)
        now = time.monotonic()
        while self._todo:
            self._todo.popleft()(self._session, now)
        for _, message in inbound:
            self._session.on_message(message, now)
        self._session.work(time.monotonic)
        if self._session.store != self._announced_store:
            self._announced_store = self._session.store
            self._on_store(self._announced_store)
