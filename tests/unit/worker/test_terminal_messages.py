"""Both roles under random schedules: each leg ends in exactly one terminal message, each block is freed exactly once.

Schedules have requests, cancels, deadlines, lost proxies, transfers that succeed or fail, steps that run ahead, and a
shutdown at any time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.decode.role import decode_loop
from baton.decode.settings import DecodeSettings
from baton.kvtransfer.blocks.hashing import block_hashes
from baton.kvtransfer.blocks.manager import BlockManager
from baton.kvtransfer.protocol.events import KvArrived, ReceiverEnded, SenderEnded
from baton.kvtransfer.protocol.receiver import Incoming
from baton.node.leg import LegKey
from baton.node.membership import ProxyLost
from baton.node.messages.control import (
    Bundle,
    Busy,
    Cancel,
    Cancelled,
    DispatchBody,
    Failed,
    HandedOver,
    Prefill,
    Reserve,
    SamplingSpec,
    Tokens,
)
from baton.prefill.role import prefill_loop
from baton.prefill.settings import PrefillSettings
from baton.tests.unit.worker.bench import BLOCK, ROOT, ManualRunner, RecordingIo, parts_of
from baton.worker.io_thread import FromProxy
from baton.worker.loop import Loop
from baton.worker.parts import Parts

STEP_S = 0.25


class Bench:
    """One worker of either role, and the transfers that it has started."""

    def __init__(self, make: Callable[[Parts], Loop], run_ahead: int, num_blocks: int) -> None:
        self.io, self.runner, self.now_s = RecordingIo(), ManualRunner(run_ahead), 100.0
        self.manager = BlockManager(num_blocks)
        self.loop = make(parts_of(self.runner, self.io, self.manager, lambda: self.now_s, max_model_len=40))
        self.names: list[str] = []
        self.cancelled: set[str] = set()
        self.over: set[object] = set()
        """Transfers that have ended."""

    def turn(self) -> bool:
        self.now_s += STEP_S
        return self.loop.turn(0.0)

    def request(self, length: int, max_tokens: int, link: str, remote: bool) -> None:
        name = f"r{len(self.names)}"
        self.names.append(name)
        tokens = tuple(range(length))
        body = DispatchBody(
            token_ids=tokens,
            prompt_len=length,
            root=ROOT,
            block_hashes=block_hashes(ROOT, tokens, BLOCK),
            sampling=SamplingSpec(max_tokens=max_tokens),
            deadline_s=6.0,
        )
        message: Prefill | Reserve = Reserve(request_id=name, attempt=0, body=body, prefill="p/1" if remote else "")
        if self.loop.role.name == "prefill":
            message = Prefill(request_id=name, attempt=0, body=body, decode="d/1", decode_address="tcp://d")
        self.io.inbox.put(FromProxy(link, message, self.now_s))

    def cancel(self, number: int) -> None:
        self.cancelled.add(f"r{number}")
        self.io.inbox.put(FromProxy("proxy 0", Cancel(request_id=f"r{number}", attempt=0), self.now_s))

    def transfers(self) -> Iterator[LegKey | Incoming]:
        """Open transfers, the oldest first."""
        for name, first, *_ in self.io.exchange.calls:
            if name in ("open_sender", "open_receiver"):
                key = first.transfer_id if isinstance(first, Incoming) else first
                if key not in self.over:
                    yield first

    def end_transfer(self, transfer: LegKey | Incoming, good: bool) -> Any:
        """The event that ends a transfer; it can only succeed if its KV was computed and it was not cancelled."""
        called = self.io.exchange.calls
        if isinstance(transfer, Incoming):
            self.over.add(transfer.transfer_id)
            if good and ("cancel_receiver", transfer.transfer_id, "cancelled") not in called:
                return KvArrived(transfer.transfer_id, 7, None, self.now_s, 0.0, 0.0)
            return ReceiverEnded(transfer.transfer_id, "broken")
        self.over.add(transfer)
        ok = good and any(call[:2] == ("token_drawn", transfer) for call in called)
        return SenderEnded(transfer, ok, "" if ok else "broken", 1, 0.1)

    def finish(self, shut_down: bool) -> None:
        """End everything that is still open."""
        if shut_down:
            self.turn()
            self.loop.drain()
            self.loop.run()
        for _ in range(400):
            for transfer in list(self.transfers()):
                self.loop._on(self.end_transfer(transfer, good=not shut_down))
            if not self.turn() and self.loop.idle and self.io.inbox.empty() and not list(self.transfers()):
                break
        self.loop.check()
        assert self.loop.idle and self.manager.num_available == self.manager.num_blocks

    def terminals(self) -> Counter[str]:
        """Terminal messages by request, without Cancelled that answers a Cancel."""
        found: Counter[str] = Counter()
        for message in self.io.sent:
            for each in message.tokens if isinstance(message, Bundle) else (message,):
                kinds = Failed | Busy | HandedOver
                ends = isinstance(each, kinds) or (isinstance(each, Tokens) and bool(each.finish))
                if ends or (isinstance(each, Cancelled) and each.request_id not in self.cancelled):
                    found[each.request_id] += 1
        return found


def make_prefill(parts: Parts) -> Loop:
    options = PrefillSettings(max_chunk_tokens=5, max_num_seqs=3, max_waiting=6, drain_s=0.0)
    return prefill_loop(parts, options, "cpu")


def make_decode(parts: Parts) -> Loop:
    options = DecodeSettings(max_chunk_tokens=5, max_num_seqs=3, max_waiting=6, spare_blocks=0, drain_s=0.0)
    return decode_loop(parts, options, "cpu")


ACTION = st.one_of(
    st.tuples(
        st.just("request"),
        st.integers(1, 30),
        st.integers(1, 6),
        st.sampled_from(["proxy 0", "proxy 1"]),
        st.booleans(),
    ),
    st.tuples(st.sampled_from(["turn", "turn", "turn", "wait", "proxy lost"])),
    st.tuples(st.just("cancel"), st.integers(0, 7)),
    st.tuples(st.just("transfer"), st.booleans()),
)


@pytest.mark.parametrize("make", [make_prefill, make_decode])
@settings(max_examples=120)
@given(st.lists(ACTION, max_size=40), st.integers(0, 2), st.integers(8, 24), st.booleans())
def test_each_leg_has_one_terminal_message_and_frees_its_blocks(
    make: Callable[[Parts], Loop], actions: list[Any], run_ahead: int, num_blocks: int, shut_down: bool
) -> None:
    """Guards every end of a leg, in every phase, against two or no terminal messages and leaked blocks."""
    bench = Bench(make, run_ahead, num_blocks)
    for action in actions:
        match action:
            case ("request", length, max_tokens, link, remote):
                bench.request(length, max_tokens, link, remote)
            case ("cancel", number):
                bench.cancel(number)
            case ("transfer", good):
                for transfer in list(bench.transfers())[:1]:
                    bench.io.inbox.put(bench.end_transfer(transfer, good))
            case ("wait",):
                bench.now_s += 2.5
            case ("proxy lost",):
                bench.io.inbox.put(ProxyLost("proxy 1"))
            case ("turn",):
                bench.turn()
        bench.manager.check()
    bench.finish(shut_down)
    found = bench.terminals()
    for name in bench.names:
        assert found[name] <= 1 if name in bench.cancelled else found[name] == 1, name
