"""GB/s between groups of ranks of equal and unequal sizes, each rank with a pool of its own: what resharding costs.

The receiver is this process, the sender a child; all ranks of both are on one GPU, or in host memory. A movement is one
chunk of `chunk_mib` of KV, in blocks of 8 units of 1 MiB (8 KV heads of an 8B model), fanned out over pairs of ranks by
kvtransfer.planes.sharded. Sizes are taken in turns, so that all meet the same machine; every pair stays connected, for
to map a peer's memory and to unmap it takes longer than a movement. After each round every unit is compared. One JSON
line a pair of sizes on standard output.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch

from baton.benchmark.gpu.pools import HOST, MIB
from baton.benchmark.harness.json_lines import JsonLines
from baton.benchmark.harness.options import new_parser
from baton.benchmark.harness.processes import MeasuringChild, answer_requests
from baton.kvtransfer.planes.base import ChunkKey, Plane
from baton.kvtransfer.planes.sharded import ShardedPlane, rank_name
from baton.kvtransfer.reshard import Cut
from baton.node.addresses import LOOPBACK
from baton.node.credentials import Credentials
from baton.node.messages.transfer import PlaneAddress
from baton.node.sockets import Context

RECEIVER = "decode/1"
UNITS = 8
TIMEOUT_S = 60.0


class ReshardedPool(Protocol):
    """The memory of a rank's units."""

    @property
    def units(self) -> torch.Tensor:
        """int64 [num_blocks * units, words of a unit]"""
        ...

    def plane(self, context: Context, name: str) -> Plane: ...

    def close(self) -> None: ...


class DeviceUnits:
    """On a GPU, served by `cuda_ipc`."""

    def __init__(self, count: int, gpu: int) -> None:
        from baton.kvtransfer.blocks.device_pool import DeviceMemory  # needs CUDA

        self._memory = DeviceMemory(count, MIB, gpu)
        self.units = self._memory.data.view(-1).view(torch.int64).view(count, -1)

    def plane(self, context: Context, name: str) -> Plane:
        from baton.kvtransfer.planes.device import device_planes

        (plane,) = device_planes(self._memory, context, name, LOOPBACK, names=("cuda_ipc",))
        return plane

    def close(self) -> None:
        self._memory.close()


class HostUnits:
    """In host memory, served by `shm`."""

    def __init__(self, count: int) -> None:
        from baton.kvtransfer.blocks.memory import HostMemory

        self._memory = HostMemory(count, MIB)
        self.units = torch.frombuffer(self._memory.view, dtype=torch.int64).view(count, -1)

    def plane(self, context: Context, name: str) -> Plane:
        from baton.kvtransfer.planes.shm import ShmPlane

        return ShmPlane(self._memory)

    def close(self) -> None:
        self._memory.close()


def sender_name(ranks: int) -> str:
    """Of the sending group of so many ranks."""
    return f"prefill/{ranks}"


class GroupEnd:
    """The ranks of one side, and the plane between the groups."""

    def __init__(self, where: str, name: str, ranks: int, num_blocks: int) -> None:
        self._cut, self._num_blocks = Cut.even(UNITS, ranks, 1), num_blocks
        context = Context(Credentials("decode" if name == RECEIVER else "prefill"))
        self._pools: list[ReshardedPool] = []
        for rank in range(ranks):
            count = num_blocks * len(self._cut.units(rank))
            self._pools.append(HostUnits(count) if where == HOST else DeviceUnits(count, int(where)))
        ends = [pool.plane(context, rank_name(name, rank)) for rank, pool in enumerate(self._pools)]
        self.plane = ShardedPlane(self._cut, num_blocks, ends)

    def address(self) -> list[str]:
        address = self.plane.describe()
        return [address.plane, address.host, address.address]

    def connect(self, peer: str, fields: Sequence[str]) -> None:
        self.plane.connect(peer, PlaneAddress(plane=fields[0], host=fields[1], address=fields[2]))

    def fill(self, seed: int) -> None:
        """Every unit with numbers that tell it from all others."""
        for rank, pool in enumerate(self._pools):
            pool.units.copy_(self._expected(rank, pool, seed))

    def count_wrong(self, seed: int) -> int:
        """Units that are not those that `fill` makes."""
        pools = enumerate(self._pools)
        return sum(int((pool.units != self._expected(rank, pool, seed)).any(1).sum()) for rank, pool in pools)

    def close(self) -> None:
        self.plane.close()
        for pool in self._pools:
            pool.close()

    def _expected(self, rank: int, pool: ReshardedPool, seed: int) -> torch.Tensor:
        held = self._cut.units(rank)
        blocks = torch.arange(self._num_blocks, device=pool.units.device)[:, None] * UNITS
        numbers = (blocks + torch.arange(held.start, held.stop, device=pool.units.device)).view(-1, 1) + (seed << 32)
        return numbers.expand(-1, pool.units.shape[1])


def receive(end: GroupEnd, sender: str, chunks: Sequence[Sequence[int]], number: int) -> float:
    """The seconds in which all chunks have arrived from this group."""
    deadline, done = time.monotonic() + TIMEOUT_S, 0
    begin = time.perf_counter()
    for seq, blocks in enumerate(chunks):
        end.plane.post_receive(sender, ChunkKey(number.to_bytes(16, "big"), seq, 0), blocks, blocks)
    while done < len(chunks):
        for each in end.plane.poll():
            assert each.ok, each
            done += 1
        assert time.monotonic() < deadline, f"{len(chunks) - done} chunks have not arrived"
    return time.perf_counter() - begin


def serve(where: str, num_blocks: int) -> None:
    """The sender's process: carries out one request a line."""
    groups: dict[int, GroupEnd] = {}
    answer_requests(partial(_carry_out, groups, where, num_blocks))
    for group in groups.values():
        group.close()


def _carry_out(groups: dict[int, GroupEnd], where: str, num_blocks: int, request: list[Any]) -> object:
    name, ranks, *arguments = request
    if name == "make":
        groups[ranks] = GroupEnd(where, sender_name(ranks), ranks, num_blocks)
        return groups[ranks].address()
    if name == "fill":
        groups[ranks].fill(*arguments)
        if where != HOST:
            torch.cuda.synchronize(int(where))
    return None


def measure(where: str, sizes: Sequence[tuple[int, int]], chunk_mib: int, rounds: int, lines: JsonLines) -> int:
    """The number of wrong units."""
    num_blocks = 2 * chunk_mib // UNITS
    chunks = [range(num_blocks // 2), range(num_blocks // 2, num_blocks)]
    seconds: dict[tuple[int, int], list[float]] = {pair: [] for pair in sizes}
    wrong = dict.fromkeys(sizes, 0)
    with MeasuringChild("reshard", "--serve", where, "--chunk-mib", str(chunk_mib)) as child:
        addresses = {ranks: child.ask(("make", ranks)) for ranks in sorted({source for source, _ in sizes})}
        ends = {
            ranks: GroupEnd(where, RECEIVER, ranks, num_blocks) for ranks in sorted({target for _, target in sizes})
        }
        for source, target in sizes:
            ends[target].connect(sender_name(source), addresses[source])
        for number in range(rounds + 1):
            for place, (source, target) in enumerate(sizes):
                seed, end = 1 + number * len(sizes) + place, ends[target]
                child.ask(("fill", source, seed))
                duration_s = receive(end, sender_name(source), chunks, seed)
                wrong[source, target] += end.count_wrong(seed)
                if number:  # the first maps the peer's memory
                    seconds[source, target].append(duration_s)
        for end in ends.values():
            end.close()
        child.close()
    equal_s = {source: statistics.median(found) for (source, target), found in seconds.items() if source == target}
    for (source, target), found in seconds.items():
        median_s = statistics.median(found)
        gb_s = round(num_blocks * UNITS * MIB / median_s / 1e9, 1)
        of_equal = round(equal_s[source] / median_s, 3) if source in equal_s else None
        name = {"where": where, "from_ranks": source, "to_ranks": target, "chunk_mib": chunk_mib}
        lines.write(**name, gb_s=gb_s, of_equal=of_equal, units_wrong=wrong[source, target])
    return sum(wrong.values())


def main(argv: Sequence[str]) -> int:
    parser = new_parser("reshard", __doc__)
    parser.add_argument("--where", default="0", help='number of the GPU, or "host"')
    parser.add_argument("--pairs", nargs="+", default=["2:2", "2:4", "4:4", "4:2", "1:1", "1:8"], help="FROM:TO ranks")
    parser.add_argument("--chunk-mib", type=int, default=256, help="KV of a chunk; two are under way at once")
    parser.add_argument("--rounds", type=int, default=9, help="of all pairs in turn")
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.serve:
        serve(options.serve, 2 * options.chunk_mib // UNITS)
        return 0
    sizes = [(int(source), int(target)) for source, _, target in (pair.partition(":") for pair in options.pairs)]
    wrong = measure(options.where, sizes, options.chunk_mib, options.rounds, JsonLines(options.output))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
