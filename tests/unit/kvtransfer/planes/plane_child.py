"""The sending end of a plane in a separate process; driven over its standard streams by test_planes_processes.

Reads JSON lines: {"connect": [peer, plane, host, address]}, {"send": [seq, [blocks]]}. Ends when its input does.
"""

from __future__ import annotations

import json
import os
import random
import select
import sys
from collections.abc import Iterator

from baton.kvtransfer.blocks.memory import HostMemory
from baton.kvtransfer.planes.base import ChunkKey, Plane
from baton.kvtransfer.planes.shm import ShmPlane
from baton.kvtransfer.planes.zeromq import ZmqPlane
from baton.node.credentials import Credentials
from baton.node.messages.transfer import PlaneAddress
from baton.node.sockets import Context


def lines(plane: Plane) -> Iterator[bytes]:
    """The lines of the input until its end, polling the plane meanwhile."""
    rest = b""
    while True:
        plane.poll()
        if select.select([0], [], [], 0.005)[0]:
            data = os.read(0, 65536)  # not sys.stdin: select does not see its buffered bytes
            if not data:
                return
            *whole, rest = (rest + data).split(b"\n")
            yield from whole


def main(kind: str, name: str, num_blocks: int, block_bytes: int) -> None:
    memory = HostMemory(num_blocks, block_bytes)
    memory.view[:] = random.Random(name).randbytes(num_blocks * block_bytes)
    context = Context(Credentials("prefill"))
    plane: Plane = ZmqPlane(context, memory, name) if kind == "zmq" else ShmPlane(memory)
    address, peer = plane.describe(), ""
    print(json.dumps([address.plane, address.host, address.address]), flush=True)
    for line in lines(plane):
        order = json.loads(line)
        if "connect" in order:
            peer, *fields = order["connect"]
            plane.connect(peer, PlaneAddress(plane=fields[0], host=fields[1], address=fields[2]))
        else:
            seq, blocks = order["send"]
            plane.post_send(peer, ChunkKey(b"x" * 16, seq, 0), blocks)
    plane.close()
    memory.close()
    context.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
