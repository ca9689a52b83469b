"""Ends of the GPU planes in a separate process, driven over its standard streams by test_planes.py.

Reads a JSON line [method, arguments ...], answers with a JSON line [kind, value]: "ok" and the result, or the name of
the exception. One end exists at a time; `make` creates it. Bytes are sent as base64.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import sys
import zlib
from dataclasses import dataclass
from itertools import product

import torch

from baton.kvtransfer.blocks.device_pool import DeviceMemory
from baton.kvtransfer.blocks.device_stage_pools import DeviceStagePools
from baton.kvtransfer.blocks.digest import BlockDigests
from baton.kvtransfer.blocks.layout import KVLayout
from baton.kvtransfer.planes.base import ChunkKey, Plane, choose
from baton.kvtransfer.planes.device import device_plane_by_layer, device_planes
from baton.kvtransfer.reshard import Cut
from baton.models.cuda.memory import unit_padding
from baton.node.addresses import LOOPBACK
from baton.node.credentials import Credentials
from baton.node.messages.transfer import PlaneAddress
from baton.node.sockets import Context


@dataclass
class Made:
    planes: list[Plane]
    plane: Plane
    memory: DeviceMemory | DeviceStagePools
    digests: BlockDigests | None


class Ends:
    def __init__(self, gpu: int) -> None:
        self.gpu = gpu
        self.context = Context(Credentials("decode"))
        self.made: Made | None = None

    def make(self, kinds: list[str], name: str, num_blocks: int, block_bytes: int) -> list[str]:
        memory = DeviceMemory(num_blocks, block_bytes, self.gpu)
        generator = torch.Generator(f"cuda:{self.gpu}").manual_seed(zlib.crc32(name.encode()))
        memory.data.view(-1).random_(0, 256, generator=generator)
        torch.cuda.synchronize(self.gpu)
        planes = device_planes(memory, self.context, name, LOOPBACK, names=tuple(kinds))
        whole_words = block_bytes % 8 == 0
        self.made = Made(planes, planes[0], memory, BlockDigests(memory.data) if whole_words else None)
        return self.describe()

    def make_stages(self, name: str, stages: int, ranks: int, gpus: list[int], scales: str) -> list[str]:
        """Pools of a small model, filled as `layers` says."""
        dtype = "float8_e4m3fn" if scales == "token" else "bfloat16"
        layout = KVLayout.of_model(
            num_layers=10,
            kv_heads=4,
            head_dim=64,
            block_tokens=16,
            dtype=dtype,
            scales=scales,  # type: ignore[arg-type]
        )
        cut = Cut.even(layout.num_units, ranks, layout.num_layers, stages)
        pools = DeviceStagePools(cut, layout, 12, gpus, _padding)
        for number, pool in enumerate(pools.pools):
            generator = torch.Generator(pool.device).manual_seed(zlib.crc32(f"{name} {number}".encode()))
            pool.memory.data.random_(0, 256, generator=generator)
            torch.cuda.synchronize(pool.device)
        plane = device_plane_by_layer(cut, pools.pools, pools.layers_digest)
        self.made = Made([plane], plane, pools, None)
        return self.describe()

    def layers(self, blocks: list[int]) -> list[str]:
        """All bytes of each of these blocks: unit by unit, of each its layers in order, as its first rank has it."""
        pools = self._made.memory
        assert isinstance(pools, DeviceStagePools)
        found = []
        for block, unit, (stage, layers) in product(blocks, range(pools.cut.total_units), enumerate(pools.cut.layers)):
            rank = pools.cut.holders(unit).start
            pool = pools.pools[stage * pools.cut.ranks + rank]
            held = pool.memory.data[block, unit - pool.layout.first_unit, : len(layers) * pool.layout.layer_bytes]
            found.append(held.cpu().numpy().tobytes())
        size = len(found) // len(blocks)
        return [base64.b64encode(b"".join(found[i * size :][:size])).decode() for i in range(len(blocks))]

    def layers_digest(self, blocks: list[int]) -> str:
        assert isinstance(self._made.memory, DeviceStagePools)
        return self._made.memory.layers_digest(blocks).hex()

    def describe(self) -> list[str]:
        address = self._made.plane.describe()
        return [address.plane, address.host, address.address]

    def describe_all(self) -> list[list[str]]:
        return [[a.plane, a.host, a.address] for a in (plane.describe() for plane in self._made.planes)]

    def choose(self, addresses: list[list[str]]) -> str | None:
        found = choose(self._made.planes, [_address(fields) for fields in addresses])
        return found.name if found else None

    def reaches(self, fields: list[str]) -> bool:
        return self._made.plane.reaches(_address(fields))

    def connect(self, peer: str, fields: list[str]) -> None:
        self._made.plane.connect(peer, _address(fields))

    def post_send(self, peer: str, key: list[object], blocks: list[int]) -> None:
        self._made.plane.post_send(peer, _key(key), blocks)

    def post_receive(self, peer: str, key: list[object], source: list[int], blocks: list[int]) -> None:
        self._made.plane.post_receive(peer, _key(key), source, blocks)

    def poll(self) -> list[list[object]]:
        return [
            [*_names(done.key), done.sending, done.ok, done.reason, done.digest.hex()]
            for done in self._made.plane.poll()
        ]

    def cancel(self, transfer_id: str) -> None:
        self._made.plane.cancel(transfer_id.encode())

    def idle(self, transfer_id: str) -> bool:
        return self._made.plane.idle(transfer_id.encode())

    def forget(self, peer: str) -> None:
        self._made.plane.forget(peer)

    def pending(self) -> bool:
        return self._made.plane.pending

    def dropped(self) -> dict[str, int]:
        return dict(self._made.plane.dropped)  # type: ignore[attr-defined]

    def content(self, blocks: list[int]) -> str:
        return base64.b64encode(self._memory.data[blocks].cpu().numpy().tobytes()).decode()

    def digest(self, blocks: list[int]) -> str:
        assert self._made.digests is not None
        return self._made.digests.digest(blocks).hex()

    def flip(self, block: int, position: int) -> None:
        self._memory.data[block, 0, position] ^= 1
        torch.cuda.synchronize(self.gpu)

    def gib_free(self) -> float:
        return torch.cuda.mem_get_info(self.gpu)[0] / (1 << 30)

    def close(self) -> None:
        if self.made is not None:
            for plane in self.made.planes:
                plane.close()
                plane.close()
            self.made.memory.close()
            self.made = None

    @property
    def _memory(self) -> DeviceMemory:
        assert isinstance(self._made.memory, DeviceMemory)
        return self._made.memory

    @property
    def _made(self) -> Made:
        assert self.made is not None
        return self.made


def _padding(layout: KVLayout) -> int:
    return unit_padding(layout.num_layers, layout.layer_bytes, layout.data_bytes)


def _address(fields: list[str]) -> PlaneAddress:
    return PlaneAddress(plane=fields[0], host=fields[1], address=fields[2])


def _key(fields: list[object]) -> ChunkKey:
    return ChunkKey(str(fields[0]).encode(), int(str(fields[1])), int(str(fields[2])))


def _names(key: ChunkKey) -> list[object]:
    return [key.transfer_id.decode(), key.seq, key.retry]


def main() -> None:
    # NCCL may print to stdout, which must not mix with our lines
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.basicConfig(level=os.environ.get("BATON_TEST_LOG", "WARNING"))
    ends = Ends(int(sys.argv[1]))
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        try:
            answer: list[object] = ["ok", getattr(ends, method)(*arguments)]
        except Exception as error:
            answer = [type(error).__name__, str(error)]
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    ends.close()


if __name__ == "__main__":
    main()
