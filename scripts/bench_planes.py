"""GB/s of the data planes between two GPUs of one machine, in two processes, through the planes as workers use them.

The receiver is this process, the sender a child. A movement is one chunk of `size_mib`, in consecutive blocks of 1 MiB;
`in_flight` of them are under way at once, as the protocol's window allows. Time runs from the first post to the moment
when the receiver's last `poll` reports its end, so agreeing on movements, Python and polling are in it; the digest is
measured beside it. After each row the moved bytes are compared by digest. One JSON line a row on standard output.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from kvtransfer.blocks.device_pool import DeviceMemory
from kvtransfer.blocks.digest import BlockDigests
from kvtransfer.planes.base import ChunkKey, Plane
from kvtransfer.planes.device import device_planes
from node.endpoint import new_context
from node.messages import PlaneAddress

MIB = 1 << 20
POOL_BLOCKS = 1024
NAMES = ("prefill/1", "decode/1")
PATIENCE_S = 60.0


class Side:
    """One end: a pool of 1 GiB on its GPU, and one plane at a time."""

    def __init__(self, gpu: int, name: str) -> None:
        self.name = name
        self.memory = DeviceMemory(POOL_BLOCKS, MIB, gpu)
        self.context = new_context()
        self.digests = BlockDigests(self.memory.data)
        self.plane: Plane | None = None
        self.done = 0
        self.nap_s = 0.0
        """Between two looks at the plane."""

    def make(self, kind: str, ctas: int) -> list[str]:
        if self.plane is not None:
            self.plane.close()
        (self.plane,) = device_planes(self.memory, self.context, self.name, "127.0.0.1", names=(kind,), nccl_ctas=ctas)
        address = self.plane.describe()
        return [address.plane, address.host, address.address]

    def connect(self, peer: str, fields: Sequence[str]) -> None:
        assert self.plane is not None
        self.plane.connect(peer, PlaneAddress(plane=fields[0], host=fields[1], address=fields[2]))

    def fill(self, seed: int) -> None:
        generator = torch.Generator(self.memory.data.device).manual_seed(seed)
        self.memory.data.view(-1).random_(0, 256, generator=generator)
        torch.cuda.synchronize(self.memory.device_index)

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

    def __init__(self, gpu: int) -> None:
        command = [sys.executable, __file__, "--serve-gpu", str(gpu)]
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


def serve(gpu: int) -> None:
    """The child: one order a line, one answer a line."""
    side = Side(gpu, NAMES[0])
    for line in sys.stdin:
        order, *arguments = json.loads(line)
        answer: object = None
        if order == "make":
            answer = side.make(*arguments)
        elif order == "connect":
            side.connect(*arguments)
        elif order == "fill":
            side.fill(*arguments)
        elif order == "digest":
            answer = [side.digests.digest(range(POOL_BLOCKS)).hex()]
        else:
            send(side, *arguments)
        print(json.dumps(answer), flush=True)
    if side.plane is not None:
        side.plane.close()


def measure_row(side: Side, child: Child, row: int, size_mib: int, in_flight: int, total_mib: int) -> dict[str, object]:
    count = max(POOL_BLOCKS // size_mib, min(256, total_mib // size_mib), 4)
    receive(side, 2 * row, size_mib, max(POOL_BLOCKS // size_mib, 2), in_flight, child)  # warm, and the whole pool
    child.ask("fill", row)
    side.memory.data.fill_(0xA5)
    torch.cuda.synchronize(side.memory.device_index)
    duration_s = receive(side, 2 * row + 1, size_mib, count, in_flight, child)
    same = [side.digests.digest(range(POOL_BLOCKS)).hex()] == child.ask("digest")
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
    side.digests.digest(blocks)
    begin = time.perf_counter()
    for _ in range(5):
        side.digests.digest(blocks)
    duration_s = (time.perf_counter() - begin) / 5
    gb_s = size_mib * MIB / duration_s / 1e9
    return {"digest_mib": size_mib, "gb_s": round(gb_s, 1), "us": round(duration_s * 1e6, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planes", nargs="+", default=["cuda_ipc", "nccl"])
    parser.add_argument("--ctas", nargs="+", type=int, default=[8, 16], help="NCCL: CTAs, a table each")
    parser.add_argument("--sizes-mib", nargs="+", type=int, default=[1, 2, 4, 8, 16, 64, 256, 1024])
    parser.add_argument("--in-flight", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--total-mib", type=int, default=8192, help="MiB to move a row, about")
    parser.add_argument("--serve-gpu", type=int, default=-1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_gpu >= 0:
        serve(options.serve_gpu)
        return
    child, side, row = Child(0), Side(1, NAMES[1]), 0
    print(json.dumps({"gpu": torch.cuda.get_device_name(1), "torch": torch.__version__}), flush=True)
    for size_mib in (8, 64, 1024):
        print(json.dumps(measure_digest(side, size_mib)), flush=True)
    for plane, ctas in [(p, c) for p in options.planes for c in (options.ctas if p == "nccl" else [0])]:
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
