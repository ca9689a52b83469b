"""GB/s of the data planes between two processes of one machine, through the planes as workers use them: `cuda_ipc` and
`nccl` between two GPUs, `shm` and `zmq` (tcp over loopback) between two pools in host memory.

The receiver is this process, the sender a child. A movement is one chunk of `size_mib`, in consecutive blocks of 1 MiB;
`in_flight` of them are under way at once, as the protocol's window allows. Time runs from the first post to the moment
when the receiver's last `poll` reports its end, so agreeing on movements, Python and polling are in it; the digest is
measured beside it. After each row the moved bytes are compared by digest. One JSON line a row on standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from baton.benchmark.gpu.pools import HOST, HOST_PLANES, MIB, POOL_BLOCKS, make_pool
from baton.kvtransfer.planes.base import ChunkKey, Plane
from baton.node.endpoint import new_context
from baton.node.messages.transfer import PlaneAddress

NAMES = ("prefill/1", "decode/1")
PATIENCE_S = 60.0
GPU_PLANES = ("cuda_ipc", "nccl")


class Side:
    """One end: a pool of 1 GiB on a GPU (its number) or "host", and one plane at a time."""

    def __init__(self, where: str, name: str) -> None:
        self.name = name
        self.pool = make_pool(where)
        self.context = new_context()
        self.plane: Plane | None = None
        self.done = 0
        self.nap_s = 0.0
        """Between two looks at the plane."""

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
        time.sleep(self.nap_s)  # if only to let the threads of NCCL have the interpreter


def blocks_of(number: int, size_mib: int) -> list[int]:
    """Movements go round the pool."""
    first = number * size_mib % POOL_BLOCKS
    return list(range(first, first + size_mib))


def transfer_id(row: int) -> bytes:
    return row.to_bytes(16, "big")


def send(side: Side, row: int, size_mib: int, count: int, in_flight: int) -> None:
    """The child's half of a row; nothing to do on a plane that pulls."""
    assert side.plane is not None
    if side.plane.pulls:
        return
    side.done, posted = 0, 0
    deadline = time.monotonic() + PATIENCE_S
    while side.done < count:
        while posted < count and posted - side.done < in_flight:
            side.plane.post_send(NAMES[1], ChunkKey(transfer_id(row), posted, 0), blocks_of(posted, size_mib))
            posted += 1
        side.poll(sending=True)
        assert time.monotonic() < deadline, "the sends do not end"


def receive(side: Side, row: int, size_mib: int, count: int, in_flight: int, child: Child) -> float:
    """The seconds of a row."""
    assert side.plane is not None
    side.done, posted = 0, 0
    ahead = in_flight if side.plane.pulls else count  # the sender decides: a receive stands ready for every ask
    deadline = time.monotonic() + PATIENCE_S
    begin = time.perf_counter()
    told = False
    while side.done < count:
        while posted < count and posted - side.done < ahead:
            blocks = blocks_of(posted, size_mib)
            side.plane.post_receive(NAMES[0], ChunkKey(transfer_id(row), posted, 0), blocks, blocks)
            posted += 1
        if not told:
            child.tell("send", row, size_mib, count, in_flight)
            told = True
        side.poll(sending=False)
        assert time.monotonic() < deadline, "the receives do not end"
    duration_s = time.perf_counter() - begin
    child.answer()
    return duration_s


class Child:
    """The sender's process."""

    def __init__(self, where: str) -> None:
        command = [sys.executable, "-P", "-m", "baton.benchmark.gpu.planes", "--serve", where]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def tell(self, *order: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self) -> list[str]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the sender's process died")
        return json.loads(line)

    def ask(self, *order: object) -> list[str]:
        self.tell(*order)
        return self.answer()


def serve(where: str) -> None:
    """The child: one order a line, one answer a line."""
    side = Side(where, NAMES[0])
    for line in sys.stdin:
        order, *arguments = json.loads(line)
        answer: object = None
        if order == "make":
            answer = side.make(*arguments)
        elif order == "connect":
            side.connect(*arguments)
        elif order == "fill":
            side.pool.fill(*arguments)
        elif order == "digest":
            answer = [side.pool.digest(range(POOL_BLOCKS)).hex()]
        else:
            send(side, *arguments)
        print(json.dumps(answer), flush=True)
    if side.plane is not None:
        side.plane.close()


def measure_row(side: Side, child: Child, row: int, size_mib: int, in_flight: int, total_mib: int) -> dict[str, object]:
    count = max(POOL_BLOCKS // size_mib, min(256, total_mib // size_mib), 4)
    receive(side, 2 * row, size_mib, max(POOL_BLOCKS // size_mib, 2), in_flight, child)  # warm, and the whole pool
    child.ask("fill", row)
    side.pool.poison()
    duration_s = receive(side, 2 * row + 1, size_mib, count, in_flight, child)
    same = [side.pool.digest(range(POOL_BLOCKS)).hex()] == child.ask("digest")
    return {
        "size_mib": size_mib,
        "in_flight": in_flight,
        "count": count,
        "gb_s": round(count * size_mib * MIB / duration_s / 1e9, 1),
        "us_each": round(duration_s / count * 1e6, 1),
        "bytes_equal": same,
    }


def measure_digest(side: Side, size_mib: int) -> dict[str, object]:
    blocks = range(size_mib)
    side.pool.digest(blocks)
    begin = time.perf_counter()
    for _ in range(5):
        side.pool.digest(blocks)
    duration_s = (time.perf_counter() - begin) / 5
    gb_s = size_mib * MIB / duration_s / 1e9
    return {"digest_mib": size_mib, "gb_s": round(gb_s, 1), "us": round(duration_s * 1e6, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planes", nargs="+", default=list(GPU_PLANES), choices=(*GPU_PLANES, *HOST_PLANES))
    parser.add_argument("--ctas", nargs="+", type=int, default=[8, 16], help="NCCL: CTAs, a table each")
    parser.add_argument("--sizes-mib", nargs="+", type=int, default=[1, 2, 4, 8, 16, 64, 256, 1024])
    parser.add_argument("--in-flight", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--total-mib", type=int, default=8192, help="MiB to move a row, about")
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    print(json.dumps({"torch": torch.__version__, "cores": os.cpu_count()}), flush=True)
    for ends, planes in ((("0", "1"), GPU_PLANES), ((HOST, HOST), HOST_PLANES)):
        if chosen := [plane for plane in options.planes if plane in planes]:
            measure(*ends, chosen, options)


def measure(sender: str, receiver: str, planes: Sequence[str], options: argparse.Namespace) -> None:
    """All rows between two pools."""
    child, side, row = Child(sender), Side(receiver, NAMES[1]), 0
    for size_mib in (8, 64, 1024):
        print(json.dumps({"receiver": receiver, **measure_digest(side, size_mib)}), flush=True)
    for plane, ctas in [(p, c) for p in planes for c in (options.ctas if p == "nccl" else [0])]:
        address, own = child.ask("make", plane, ctas), side.make(plane, ctas)
        side.connect(NAMES[0], address)
        child.ask("connect", NAMES[1], own)
        for size_mib in options.sizes_mib:
            for in_flight in options.in_flight:
                row += 1
                result = measure_row(side, child, row, size_mib, in_flight, options.total_mib)
                print(json.dumps({"plane": plane, "ctas": ctas, **result}), flush=True)
    assert side.plane is not None and child.process.stdin is not None
    side.plane.close()
    child.process.stdin.close()
    child.process.wait(20)


if __name__ == "__main__":
    main()
