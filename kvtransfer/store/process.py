"""The store's process: its endpoint, its signals and its one loop. What it decides is server.py's."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from baton.kvtransfer.store.arena import Arena
from baton.kvtransfer.store.checks import Checks
from baton.kvtransfer.store.disk_thread import Disk
from baton.kvtransfer.store.folders import Folders
from baton.kvtransfer.store.lower import LowerTier, NoLowerTier
from baton.kvtransfer.store.peers import Peers
from baton.kvtransfer.store.publisher import EventPublisher
from baton.kvtransfer.store.server import StoreServer
from baton.kvtransfer.store.settings import StoreSettings
from baton.node.credentials import link_credentials
from baton.node.endpoint import Endpoint, identity_of
from baton.node.errors import SettingsError
from baton.node.garbage import freeze_startup_objects
from baton.node.host import NODE_FILES, allow_files, default_name
from baton.node.messages.store import decode_store
from baton.node.probe import NodeState, NoProbes, Probes, open_probes
from baton.node.sockets import Context
from baton.node.telemetry import configure_logging, log_event

logger = logging.getLogger("store")

MAX_WAIT_S = 0.05
HELD_FOR_DISK = 4
"""At most one in so many bytes of the arena waits for being written to disk."""


Over = Callable[[LowerTier, Callable[[], None]], LowerTier]
"""What a benchmark puts between store and disk; called with what wakes the loop when `poll` has results."""


class StoreProcess:
    """Everything that the store owns, from its start to `close`."""

    def __init__(self, settings: StoreSettings, over: Over) -> None:
        """Raises SettingsError where the arena, the disk or the address cannot be had."""
        credentials = link_credentials("store", settings.secret_file, settings.insecure_network)
        self._stopping = threading.Event()
        self._turned_at = time.monotonic()
        self._arena = Arena(int(settings.ram_gib * (1 << 30)))
        context, incarnation = Context(credentials), time.time_ns() >> 10
        name = settings.store_id or default_name("store")
        identity = identity_of(name, incarnation)
        self._endpoint = Endpoint(context, identity, settings.bind, decode_store)
        calling = Endpoint(context, identity, None)
        proxies = {f"proxy@{address}": address for address in settings.proxy}
        for link, address in proxies.items():
            calling.connect(link, address, "proxy")
        self._events = EventPublisher(calling, name, incarnation, tuple(proxies), time.monotonic())
        links = {f"peer@{address}": address for address in settings.peer}
        for link, address in links.items():
            self._endpoint.connect(link, address, "store")
        self._lower = over(self._open_lower(settings), self._endpoint.wake)
        peers = Peers(tuple(links), self._endpoint.send)
        self._checker = ThreadPoolExecutor(1, "check")
        checks = Checks(self._checker.submit, self._endpoint.wake)
        self._server = StoreServer(
            self._arena, identity, self._lower, peers, checks, self._endpoint.send, self._events.ram
        )
        log_event(
            logger,
            "store_started",
            store=identity,
            address=self._endpoint.address,
            ram_mib=round(self._arena.size_bytes / (1 << 20), 1),
            disk_gib=settings.disk_gib,
            peers=len(links),
        )

    def run(self) -> None:
        """Serve until `stop`."""
        while not self._stopping.is_set():
            inbound = self._endpoint.receive(MAX_WAIT_S)
            now = self._turned_at = time.monotonic()
            for peer, message in inbound:
                self._server.on_message(peer, message, now)
            self._server.tick(now)
            self._events.turn(self._server.stats, now)

    def state(self) -> NodeState:
        """For probes. May be called from any thread."""
        return NodeState(self._turned_at, "draining" if self._stopping.is_set() else self._events.unready)

    def stop(self) -> None:
        """May be called from any thread and from a signal handler."""
        self._stopping.set()

    def close(self) -> None:
        self._checker.shutdown(cancel_futures=True)
        self._lower.close()
        self._events.close()
        self._endpoint.close()
        self._arena.close()

    def _open_lower(self, settings: StoreSettings) -> LowerTier:
        quota_bytes = int(settings.disk_gib * (1 << 30))
        if not quota_bytes:
            return NoLowerTier()
        folders = Folders(settings.path, settings.disk, quota_bytes, self._events.on_disk)
        return Disk(folders.open, self._arena.size_bytes // HELD_FOR_DISK, self._endpoint.wake)


def as_it_is(lower: LowerTier, wake: Callable[[], None]) -> LowerTier:
    return lower


def serve(settings: StoreSettings, over: Over = as_it_is) -> int:
    """Run the store until SIGTERM; the exit status."""
    configure_logging(settings.log_level, "store")
    allow_files(NODE_FILES)
    try:
        with open_probes(settings.probe_port, settings.bind) as probes:
            return _serve(StoreProcess(settings, over), probes)
    except SettingsError as error:
        log_event(logger, "store_refused", level=logging.ERROR, reason=str(error))
        return 1


def _serve(process: StoreProcess, probes: Probes | NoProbes) -> int:
    probes.watch(process.state)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: process.stop())
    freeze_startup_objects()
    try:
        process.run()
    finally:
        process.close()
    log_event(logger, "store_stopped")
    return 0
