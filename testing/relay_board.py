"""All links of a cluster on this machine, each through a relay of its own, and faults for them by name.

    board = RelayBoard(seed)                    runs relays in a thread, until `close`
    board.route(spec) -> ChildSpec              a node that dials through relays, for `launch.Cluster(edit=...)`
    board.set_fault(board.links("data"), LinkFault(FaultKind.STALL))

A process that is started so (relayed_process.py) asks the board, before it dials an address, for the relay to dial
instead. So it works for links that are encrypted too: what peers tell one another of their addresses is not read.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from baton.launch.supervisor import ChildSpec
from baton.testing.relay import LinkFault, Relay

T = TypeVar("T")

CALL_TIMEOUT_S = 10.0
LINK_KINDS = ("proxy-prefill", "proxy-decode", "proxy-store", "worker-store", "prefill-decode", "data")
"""Named by what they connect; the last two are the messages and the bytes of transfers."""


@dataclass(frozen=True, slots=True)
class RelayedLink:
    """One link: its kind, the node that dials it, and the port that it leads to."""

    kind: str
    dialer: str
    port: int

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.dialer}:{self.port}"


class RelayBoard:
    """Makes relays as they are asked for. Its methods may be called from any thread but its own."""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._known: dict[int, str] = {}  # what listens at a port; all others are workers
        self._relays: dict[RelayedLink, Relay] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relays", daemon=True)
        self._thread.start()
        self.port = self._call(self._listen())

    def route(self, spec: ChildSpec) -> ChildSpec:
        """The same node, which dials through relays. Where a proxy or the store listens is in its arguments."""
        for option, name in (("--control-address", "proxy"), ("--bind", "store")):
            if spec.group == name and option in spec.argv:
                address = spec.argv[spec.argv.index(option) + 1]
                self._known[int(address.rpartition(":")[2])] = name
        program, *rest = spec.argv  # python -P -m baton.ROLE ...
        module, *arguments = rest[2:]
        through = (program, "-P", "-m", "baton.testing.relayed_process", str(self.port), spec.name, module)
        return replace(spec, argv=(*through, *arguments))

    def links(self, kind: str = "") -> list[RelayedLink]:
        """Those that were dialed so far, of one kind or all."""
        return sorted((link for link in [*self._relays] if kind in ("", link.kind)), key=lambda link: link.name)

    def set_fault(self, links: Iterable[RelayedLink], fault: LinkFault | None) -> None:
        self._call(self._set_fault(list(links), fault))

    def num_hits(self) -> int:
        """Pieces that faults have changed so far."""
        return sum(relay.num_hits for relay in [*self._relays.values()])

    def close(self) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CALL_TIMEOUT_S)
        self._loop.close()

    # -- in the thread

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(CALL_TIMEOUT_S)

    async def _listen(self) -> int:
        self._server = await asyncio.start_server(self._on_question, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _on_question(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A process asks for the relay of a link that it is about to dial, in one line of JSON."""
        question = json.loads(await reader.readline())
        relay = await self._relay(question["dialer"], int(question["port"]), data=question["data"])
        writer.write(b"%d\n" % relay.port)
        await writer.drain()
        writer.close()

    async def _relay(self, dialer: str, port: int, *, data: bool) -> Relay:
        link = RelayedLink(self._kind(dialer, port, data=data), dialer, port)
        if link not in self._relays:
            relay = Relay(port, f"{self._seed}/{link.kind}/{link.dialer}")
            await relay.start()
            self._relays.setdefault(link, relay)
        return self._relays[link]

    def _kind(self, dialer: str, port: int, *, data: bool) -> str:
        role, target = dialer.partition("-")[0], self._known.get(port, "worker")
        if target == "proxy":
            return f"proxy-{role}"
        if target == "store":
            return "worker-store"
        return "data" if data else "prefill-decode"

    async def _set_fault(self, links: list[RelayedLink], fault: LinkFault | None) -> None:
        for link in links:
            self._relays[link].set_fault(fault)

    async def _close(self) -> None:
        self._server.close()
        for relay in self._relays.values():
            await relay.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
