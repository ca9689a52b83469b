"""The store's process: its endpoint, its signals and its one loop. What it decides is server.py's."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time

from kvtransfer.store.arena import Arena
from kvtransfer.store.lower import Lower, NoLower
from kvtransfer.store.peers import Peers
from kvtransfer.store.server import StoreServer
from kvtransfer.store.settings import StoreSettings
from node.endpoint import Endpoint, identity_of, new_context
from node.errors import SettingsError
from node.settings import require_loopback
from node.store_messages import decode_store
from node.telemetry import configure_logging, log_event

logger = logging.getLogger("store")

MAX_WAIT_S = 0.05


class StoreProcess:
    """Everything that the store owns, from its start to `close`."""

    def __init__(self, settings: StoreSettings) -> None:
        """Raises SettingsError where the arena, the disk or the address cannot be had."""
        require_loopback(settings.bind, settings.insecure_network)
        incarnation = time.time_ns() >> 10
        self._arena = Arena(int(settings.ram_gib * (1 << 30)))
        self._endpoint = Endpoint(
            new_context(), identity_of(f"store-{os.getpid()}", incarnation), settings.bind, decode_store
        )
        links = {f"peer@{address}": address for address in settings.peer}
        for link, address in links.items():
            self._endpoint.connect(link, address)
        self._lower: Lower = NoLower()
        peers = Peers(tuple(links), self._endpoint.send)
        self._server = StoreServer(self._arena, incarnation, self._lower, peers, self._endpoint.send)
        self._stopping = threading.Event()
        log_event(
            logger,
            "store_started",
            address=self.address,
            ram_mib=round(self._arena.num_regions * self._arena.region_bytes / (1 << 20), 1),
            disk_gib=settings.disk_gib,
            peers=len(links),
        )

    @property
    def address(self) -> str:
        return self._endpoint.address

    def run(self) -> None:
        """Serve until `stop`."""
        while not self._stopping.is_set():
            inbound = self._endpoint.receive(MAX_WAIT_S)
            now = time.monotonic()
            for peer, message in inbound:
                self._server.on_message(peer, message, now)
            self._server.tick(now)

    def stop(self) -> None:
        """May be called from any thread and from a signal handler."""
        self._stopping.set()

    def close(self) -> None:
        self._lower.close()
        self._endpoint.close()
        self._arena.close()


def serve(settings: StoreSettings) -> int:
    """Run the store until SIGTERM; the exit status."""
    configure_logging(settings.log_level, "store")
    try:
        process = StoreProcess(settings)
    except SettingsError as error:
        log_event(logger, "store_refused", level=logging.ERROR, reason=str(error))
        return 1
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: process.stop())
    try:
        process.run()
    finally:
        process.close()
    log_event(logger, "store_stopped")
    return 0
