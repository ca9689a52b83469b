"""GB/s of the data planes between two processes of one machine, through the planes as workers use them: `cuda_ipc` and
`nccl` between two GPUs, `shm` and `zmq` (tcp over loopback) between two pools in host memory.

The receiver is this process, the sender a child. A movement is one chunk of `size_mib`, in consecutive blocks of 1 MiB;
`in_flight` of them are under way at once, as the protocol's window allows. Time runs from the first post to the moment
when the receiver's last `poll` reports its end, so agreeing on movements, Python and polling are in it; the digest is
measured beside it. After each row the moved bytes are compared by digest. One JSON line a row on standard output.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from baton.benchmark.gpu.pools import HOST, HOST_PLANES, MIB, POOL_BLOCKS, make_pool
from baton.benchmark.harness.json_lines import JsonLines
from baton.benchmark.harness.options import new_parser
from baton.benchmark.harness.processes import MeasuringChild, answer_requests
from baton.kvtransfer.planes.base import ChunkKey, Plane
from baton.node.credentials import Credentials
from baton.node.messages.transfer import PlaneAddress
from baton.node.sockets import Context

NAMES = ("prefill/1", "decode/1")
TIMEOUT_S = 60.0
GPU_PLANES = ("cuda_ipc", "nccl")


class PlaneEnd:
    """One end of a transfer: a pool of 1 GiB on a GPU (its number) or "host", and one plane at a time."""

    def __init__(self, where: str, name: str) -> None:
        self.name = name
        self.pool = make_pool(where)
        self.context = Context(Credentials("prefill" if name == NAMES[0] else "decode"))
        self.plane: Plane | None = None
        self.done = 0
        self.poll_interval_s = 0.0

    def make(self, kind: str, ctas: int) -> list[str]:
        if self.plane is not None:
            self.plane.close()
        self.plane = self.pool.plane(kind, ctas, self.context, self.name)
        address = self.plane.describe()
        return [address.plane, address.host, address.address]

    def connect(self, peer: str, fields: Sequence[str]) -> None:
        assert self.plane is not None
        self.plane.connect(peer, PlaneAddress(plane=fields[0], host=fields[1], address=fields[2]))

    def poll(self, sending: bool) -> None:
        assert self.plane is not None
        for done in self.plane.poll():
            assert done.ok, done
            self.done += done.sending is sending
        time.sleep(self.poll_interval_s)  # 0 still yields the interpreter to the threads of NCCL


def blocks_of(number: int, size_mib: int) -> list[int]:
    """Movements go round the pool."""
    first = number * size_mib % POOL_BLOCKS
    return list(range(first, first + size_mib))


def transfer_id(row: int) -> bytes:
    return row.to_bytes(16, "big")


def send(end: PlaneEnd, row: int, size_mib: int, count: int, in_flight: int) -> None:
    """The child's half of a row; nothing to do on a plane that pulls."""
    assert end.plane is not None
    if end.plane.pulls:
        return
    end.done, posted = 0, 0
    deadline = time.monotonic() + TIMEOUT_S
    while end.done < count:
        while posted < count and posted - end.done < in_flight:
            end.plane.post_send(NAMES[1], ChunkKey(transfer_id(row), posted, 0), blocks_of(posted, size_mib))
            posted += 1
        end.poll(sending=True)
        assert time.monotonic() < deadline, f"{count - end.done} of {count} sends have not ended"


def receive(end: PlaneEnd, row: int, size_mib: int, count: int, in_flight: int, child: MeasuringChild) -> float:
    """The seconds of a row."""
    assert end.plane is not None
    end.done, posted = 0, 0
    ahead = in_flight if end.plane.pulls else count  # else the sender limits what is in flight
    deadline = time.monotonic() + TIMEOUT_S
    begin = time.perf_counter()
    asked = False
    while end.done < count:
        while posted < count and posted - end.done < ahead:
            blocks = blocks_of(posted, size_mib)
            end.plane.post_receive(NAMES[0], ChunkKey(transfer_id(row), posted, 0), blocks, blocks)
            posted += 1
        if not asked:
            child.send(("send", row, size_mib, count, in_flight))
            asked = True
        end.poll(sending=False)
        assert time.monotonic() < deadline, f"{count - end.done} of {count} receives have not ended"
    duration_s = time.perf_counter() - begin
    child.receive()
    return duration_s


def start_sender(where: str) -> MeasuringChild:
    """The process of the other end."""
    return MeasuringChild("planes", "--serve", where)


def serve(where: str) -> None:
    """The sender's process: carries out one request a line."""
    end = PlaneEnd(where, NAMES[0])
    answer_requests(partial(_carry_out, end))
    if end.plane is not None:
        end.plane.close()


def _carry_out(end: PlaneEnd, request: list[Any]) -> object:
    name, *arguments = request
    if name == "make":
        return end.make(*arguments)
    if name == "digest":
        return [end.pool.digest(range(POOL_BLOCKS)).hex()]
    if name == "connect":
        end.connect(*arguments)
    elif name == "fill":
        end.pool.fill(*arguments)
    else:
        send(end, *arguments)
    return None


def measure_row(
    end: PlaneEnd, child: MeasuringChild, row: int, size_mib: int, in_flight: int, total_mib: int
) -> dict[str, object]:
    count = max(POOL_BLOCKS // size_mib, min(256, total_mib // size_mib), 4)
    receive(end, 2 * row, size_mib, max(POOL_BLOCKS // size_mib, 2), in_flight, child)  # warm, and the whole pool
    child.ask(("fill", row))
    end.pool.poison()
    duration_s = receive(end, 2 * row + 1, size_mib, count, in_flight, child)
    same = [end.pool.digest(range(POOL_BLOCKS)).hex()] == child.ask(("digest",))
    return {
        "size_mib": size_mib,
        "in_flight": in_flight,
        "count": count,
        "gb_s": round(count * size_mib * MIB / duration_s / 1e9, 1),
        "us_each": round(duration_s / count * 1e6, 1),
        "bytes_equal": same,
    }


def measure_digest(end: PlaneEnd, size_mib: int) -> dict[str, object]:
    blocks = range(size_mib)
    end.pool.digest(blocks)
    begin = time.perf_counter()
    for _ in range(5):
        end.pool.digest(blocks)
    duration_s = (time.perf_counter() - begin) / 5
    gb_s = size_mib * MIB / duration_s / 1e9
    return {"digest_mib": size_mib, "gb_s": round(gb_s, 1), "us": round(duration_s * 1e6, 1)}


def main(argv: Sequence[str]) -> int:
    parser = new_parser("planes", __doc__)
    parser.add_argument(
        "--planes",
        nargs="+",
        default=list(GPU_PLANES),
        choices=(*GPU_PLANES, *HOST_PLANES),
        help="the planes to measure",
    )
    parser.add_argument("--ctas", nargs="+", type=int, default=[8, 16], help="NCCL: CTAs, a table each")
    parser.add_argument("--sizes-mib", nargs="+", type=int, default=[1, 2, 4, 8, 16, 64, 256, 1024], help="of a chunk")
    parser.add_argument("--in-flight", nargs="+", type=int, default=[1, 8], help="chunks under way at once")
    parser.add_argument("--total-mib", type=int, default=8192, help="MiB to move a row, about")
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.serve:
        serve(options.serve)
        return 0
    lines = JsonLines(options.output)
    lines.write(torch=torch.__version__, cores=os.cpu_count())
    for ends, planes in ((("0", "1"), GPU_PLANES), ((HOST, HOST), HOST_PLANES)):
        if chosen := [plane for plane in options.planes if plane in planes]:
            measure(*ends, chosen, options, lines)
    return 0


def measure(sender: str, receiver: str, planes: Sequence[str], options: argparse.Namespace, lines: JsonLines) -> None:
    """All rows between two pools."""
    with start_sender(sender) as child:
        end, row = PlaneEnd(receiver, NAMES[1]), 0
        for size_mib in (8, 64, 1024):
            lines.write(receiver=receiver, **measure_digest(end, size_mib))
        for plane, ctas in [(p, c) for p in planes for c in (options.ctas if p == "nccl" else [0])]:
            connect(end, child, plane, ctas)
            for size_mib in options.sizes_mib:
                for in_flight in options.in_flight:
                    row += 1
                    result = measure_row(end, child, row, size_mib, in_flight, options.total_mib)
                    lines.write(plane=plane, ctas=ctas, **result)
        assert end.plane is not None
        end.plane.close()
        child.close()


def connect(end: PlaneEnd, child: MeasuringChild, plane: str, ctas: int) -> None:
    """A new plane between the two processes."""
    address, own = child.ask(("make", plane, ctas)), end.make(plane, ctas)
    end.connect(NAMES[0], address)
    child.ask(("connect", NAMES[1], own))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
