"""What encrypted links cost: hand-over of KV over the zmq plane, and control messages, with keys and in the clear.

Both ends are in this process, each with a ZeroMQ context and so an I/O thread of its own, where encryption takes place.
A hand-over lasts from the posted send to the last block in the receiver's pool; control messages are bundles of tokens
as a decode worker sends them, from the first send to the last one decoded. CPU time is that of both ends; other
programs disturb it less than they do the rest. Rounds are in turns.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from baton.benchmark.harness.errors import BenchmarkFailed
from baton.benchmark.harness.json_lines import JsonLines
from baton.benchmark.harness.options import new_parser
from baton.benchmark.harness.processes import machine_text
from baton.benchmark.harness.statistics import percentile
from baton.benchmark.load.table import markdown
from baton.kvtransfer.blocks.memory import HostMemory
from baton.kvtransfer.planes.base import ChunkKey
from baton.kvtransfer.planes.zeromq import ZmqPlane
from baton.node.credentials import Credentials, Keys, NodeRole
from baton.node.endpoint import Endpoint
from baton.node.messages.control import Bundle, Tokens
from baton.node.sockets import Context

MIB = 1 << 20
BLOCK_BYTES = MIB
SIZES_MIB = (1, 8, 64)
TIMEOUT_S = 60.0
BATCH = 500
"""Control messages that are under way at once."""
LINKS = {"in the clear": None, "CURVE": Keys(b"benchmark of the links' security")}


@dataclass(frozen=True, slots=True)
class LinkCost:
    """Of one hand-over or one control message."""

    wall_s: float
    cpu_s: float


@contextmanager
def context_of(role: NodeRole, keys: Keys | None) -> Iterator[Context]:
    context = Context(Credentials(role, keys))
    try:
        yield context
    finally:
        context.close()


def hand_over_costs(keys: Keys | None, repeat: int) -> dict[int, LinkCost]:
    """Median wall time and mean CPU time of a hand-over, by MiB."""
    num_blocks = max(SIZES_MIB) * MIB // BLOCK_BYTES
    with context_of("prefill", keys) as one, context_of("decode", keys) as other:
        pools = HostMemory(num_blocks, BLOCK_BYTES), HostMemory(num_blocks, BLOCK_BYTES)
        pools[0].view[:] = bytes(range(256)) * (len(pools[0].view) // 256)
        sender, receiver = ZmqPlane(one, pools[0], "prefill/1"), ZmqPlane(other, pools[1], "decode/1")
        sender.connect("decode/1", receiver.describe())
        try:
            _move(sender, receiver, 0, 1)  # connects
            return {size: _moves(sender, receiver, size, repeat) for size in SIZES_MIB}
        finally:
            sender.close()
            receiver.close()
            for pool in pools:
                pool.close()


def _moves(sender: ZmqPlane, receiver: ZmqPlane, size_mib: int, repeat: int) -> LinkCost:
    spent = time.process_time()
    took_s = [_move(sender, receiver, size_mib, size_mib * MIB // BLOCK_BYTES) for _ in range(repeat)]
    return LinkCost(percentile(took_s, 50), (time.process_time() - spent) / repeat)


def _move(sender: ZmqPlane, receiver: ZmqPlane, seq: int, num_blocks: int) -> float:
    """The seconds that so many blocks take."""
    key, blocks = ChunkKey(b"t" * 16, seq, 0), range(num_blocks)
    receiver.post_receive("prefill/1", key, blocks, blocks)
    begin = time.perf_counter()
    sender.post_send("decode/1", key, blocks)
    left = {True, False}  # sending or not
    while left:
        left -= {done.sending for plane in (sender, receiver) for done in plane.poll() if done.ok}
        if time.perf_counter() - begin > TIMEOUT_S:
            raise BenchmarkFailed(f"{num_blocks} blocks did not arrive within {TIMEOUT_S:g} s")
        if False in left:
            receiver.sockets()[0].poll(10)  # type: ignore[attr-defined]
    return time.perf_counter() - begin


def message_cost(keys: Keys | None, count: int, num_tokens: int) -> LinkCost:
    """Mean of bundles of so many tokens that a worker sends, and a proxy receives and decodes."""
    tokens = tuple(Tokens(request_id=f"cmpl-{row:032x}", attempt=0, index=9, ids=(row,)) for row in range(num_tokens))
    bundle = Bundle(tokens=tokens)
    with context_of("proxy", keys) as one, context_of("decode", keys) as other:
        proxy, worker = Endpoint(one, "proxy", "tcp://127.0.0.1:0"), Endpoint(other, "decode-0/1", None)
        worker.connect("proxy", proxy.address, "proxy")
        try:
            _pass(worker, proxy, bundle, 1)  # connects
            begin, spent = time.perf_counter(), time.process_time()
            for _ in range(count // BATCH):
                _pass(worker, proxy, bundle, BATCH)
            sent = count // BATCH * BATCH
            return LinkCost((time.perf_counter() - begin) / sent, (time.process_time() - spent) / sent)
        finally:
            worker.close()
            proxy.close()


def _pass(worker: Endpoint, proxy: Endpoint, bundle: Bundle, count: int) -> None:
    for _ in range(count):
        if not worker.send("proxy", bundle):
            raise BenchmarkFailed("the worker's queue is full")
    deadline = time.perf_counter() + TIMEOUT_S
    while count:
        count -= len(proxy.receive(1.0))
        if time.perf_counter() > deadline:
            raise BenchmarkFailed(f"{count} messages did not arrive within {TIMEOUT_S:g} s")


def main(argv: Sequence[str]) -> int:
    parser = new_parser("links", __doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each with keys and without")
    parser.add_argument("--repeat", type=int, default=10, help="hand-overs of each size in a round")
    parser.add_argument("--messages", type=int, default=20_000, help="control messages of a round")
    parser.add_argument("--tokens", type=int, default=8, help="tokens of a control message")
    options = parser.parse_args(argv)
    lines = JsonLines(options.output)
    lines.begin(argv)
    found: dict[str, list[tuple[dict[int, LinkCost], LinkCost]]] = defaultdict(list)
    for round_number in range(options.rounds):
        for name in LINKS if round_number % 2 == 0 else reversed(LINKS):
            moved = hand_over_costs(LINKS[name], options.repeat)
            message = message_cost(LINKS[name], options.messages, options.tokens)
            lines.put(
                "links",
                link=name,
                hand_over_ms={size: 1e3 * cost.wall_s for size, cost in moved.items()},
                hand_over_cpu_ms={size: 1e3 * cost.cpu_s for size, cost in moved.items()},
                messages_s=1 / message.wall_s,
                message_cpu_us=1e6 * message.cpu_s,
            )
            found[name].append((moved, message))
    rows = []
    for name, runs in found.items():
        moved = {size: _median([costs[size] for costs, _ in runs]) for size in SIZES_MIB}
        rows.append([name, *(_moved(size, cost) for size, cost in moved.items()), _message([each for _, each in runs])])
    print(markdown(("links", *(f"{size} MiB" for size in SIZES_MIB), "control messages"), rows))
    print(f"medians of {options.rounds} rounds; {options.tokens} tokens a control message; {machine_text()}")
    return 0


def _median(costs: Sequence[LinkCost]) -> LinkCost:
    return LinkCost(percentile([cost.wall_s for cost in costs], 50), percentile([cost.cpu_s for cost in costs], 50))


def _moved(size_mib: int, cost: LinkCost) -> str:
    gb_s = size_mib * MIB / cost.wall_s / 1e9
    return f"{cost.wall_s * 1e3:.1f} ms, {gb_s:.2f} GB/s, {cost.cpu_s * 1e3:.1f} CPU ms"


def _message(costs: Sequence[LinkCost]) -> str:
    cost = _median(costs)
    return f"{1 / cost.wall_s:,.0f}/s, {cost.cpu_s * 1e6:.0f} CPU us"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
