"""Compares repeated launches with launches by Triton alone, for sm_90, where nothing is launched; run as a process.

Prints one JSON line a case: how many launches reached the driver, for how many of them Triton looked up what is
compiled, and whether they were those that Triton alone makes: the same kernels, grids and arguments.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from baton.kernels.triton import decode_attention, latent_products, prefill_attention, prefill_gluon, widen
from baton.kernels.triton.blocks import BlockChecksums, checksum_scratch
from baton.kernels.triton.decode_plan import DecodePlan
from baton.kernels.triton.latent_decode import latent_decode_attention
from baton.kernels.triton.latent_prefill import Expanded, latent_prefill_attention
from baton.kernels.triton.pool import PagedPool
from baton.tests.unit.kernels.compile_sm90 import NoDevice

LAYERS = (3, 0, 1, 16, 2)
"""Of numbers for which Triton compiles kernels of their own, if it may: 0, 1 and multiples of 16."""
HEADS, KV_HEADS, LATENT_HEADS, DIM, BLOCK, ROWS = 32, 8, 16, 128, 64, 8
launched: list[tuple] = []
lookups: list[str] = []


class RecordingDevice(NoDevice):
    """NoDevice with as much of a driver as a launch asks for."""

    utils = SimpleNamespace(
        load_binary=lambda *binary: (1, 1, 32, 0, 1024),
        unload_module=lambda module: None,
        get_device_properties=lambda device: {"max_shared_mem": 232448},
    )

    @staticmethod
    def launcher_cls(source: Any, metadata: Any) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, *rest: Any) -> None:
            arguments = rest[6:]  # behind the stream, the function, what is packed, and three of hooks
            launched.append((metadata.hash, x, y, z, *map(described, arguments)))

        return launch


def described(argument: Any) -> object:
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr(), argument.dtype
    if hasattr(argument, "block_shape"):
        return argument.base.data_ptr(), *argument.shape, *argument.strides, *argument.block_shape
    return argument


def ids(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32)


def rows(count: int) -> torch.Tensor:
    return torch.empty(count, HEADS, DIM, dtype=torch.bfloat16)


def pool(layers: int = 20) -> PagedPool:
    return PagedPool.of(torch.empty(2, KV_HEADS, layers, 2, BLOCK, DIM, dtype=torch.bfloat16))


def fp8_pool() -> PagedPool:
    whole = torch.empty(2, KV_HEADS, 20, 2, BLOCK, DIM, dtype=torch.float8_e4m3fn)
    return PagedPool.of(whole, torch.empty(20, 2, KV_HEADS))


def sinks_of_layers() -> list[torch.Tensor]:
    """Those of one layer begin where Triton's other kernels end: at no multiple of 16 bytes."""
    sinks = [torch.empty(HEADS) for _ in range(20)]
    sinks[16] = torch.empty(HEADS + 1)[1:]
    return sinks


def decode(paged: PagedPool) -> Callable[[int], Callable[[int], None]]:
    plan, query, out, tables, lengths = DecodePlan(32, 3), rows(ROWS), rows(ROWS), ids(ROWS, 4), ids(ROWS)
    scratch = decode_attention.DecodeScratch.make(ROWS, plan.num_parts, HEADS, KV_HEADS, DIM, "cpu")
    sinks = sinks_of_layers()

    def first(layer: int) -> Callable[[int], None]:
        of_layer = decode_attention.decode_attention(
            query, paged, layer, tables, lengths, plan, scratch, out, sinks=sinks[layer], pdl=True
        )
        return lambda layer: of_layer(layer, sinks[layer])

    return first


def prefill() -> Callable[[int], Callable[[int], None]]:
    paged, query, out, sinks = pool(), rows(ROWS), rows(ROWS), sinks_of_layers()
    arrays = ids(1, 4), ids(2), ids(1), ids(HEADS, 3)

    def first(layer: int) -> Callable[[int], None]:
        of_layer = prefill_attention.prefill_attention(query, paged, layer, *arrays, 128, out, sinks=sinks[layer])
        return lambda layer: of_layer(layer, sinks[layer])

    return first


def gluon() -> Callable[[int], Callable[[int], None]]:
    paged, query, out = pool(), rows(ROWS), rows(ROWS)
    arrays = ids(1, 4), ids(2), ids(1), ids(HEADS, 3)
    return lambda layer: prefill_gluon.prefill_attention(query, paged, layer, *arrays, 132, None, out)


def widened() -> Callable[[int], Callable[[int], None]]:
    paged, tables, lengths, out, out_tables = fp8_pool(), ids(1, 4), ids(1), pool(1), ids(1, 4)
    return lambda layer: widen.widen_context(paged, layer, tables, lengths, out, out_tables, 132)


def latent_decode() -> Callable[[int], Callable[[int], None]]:
    plan, query, absorbed, out = DecodePlan(40, 3, 4), latent_rows(192), latent_rows(576), latent_rows(128)
    paged, tables, weights = latent_pool(), ids(ROWS, 4), latent_weights()
    scratch = decode_attention.DecodeScratch.make(ROWS, plan.num_chunks, LATENT_HEADS, 1, 512, "cpu")

    def first(layer: int) -> Callable[[int], None]:
        absorb = latent_products.absorb(query, weights[layer], absorbed, pdl=True)
        attend = latent_decode_attention(absorbed, paged, layer, tables, plan, scratch, scale=0.1, pdl=True)
        raise_merged = latent_products.raise_merged(scratch, plan, weights[layer], out, pdl=True)

        def of_layer(layer: int) -> None:
            absorb(weights[layer])
            attend(layer)
            raise_merged(weights[layer])

        return of_layer

    return first


def latent_prefill() -> Callable[[int], Callable[[int], None]]:
    paged, query, out, weights = latent_pool(), latent_rows(192), latent_rows(128), latent_weights()
    expanded = Expanded.make(64, ROWS, LATENT_HEADS, 128, 128, 64, torch.bfloat16, "cpu")  # of four, in four slices
    arrays = ids(1, 4), ids(2), ids(1), ids(LATENT_HEADS, 3)

    def first(layer: int) -> Callable[[int], None]:
        of_layer = latent_prefill_attention(query, paged, layer, *arrays, weights[layer], expanded, 132, out, scale=0.1)
        return lambda layer: of_layer(layer, weights[layer])

    return first


def latent_rows(dim: int) -> torch.Tensor:
    return torch.empty(ROWS, LATENT_HEADS, dim, dtype=torch.bfloat16)


def latent_pool() -> PagedPool:
    return PagedPool.of(torch.empty(2, 1, 20, 1, BLOCK, 576, dtype=torch.bfloat16), planes=1)


def latent_weights() -> list[torch.Tensor]:
    return [torch.empty(LATENT_HEADS, 256, 512, dtype=torch.bfloat16) for _ in range(20)]


def checksums() -> Callable[[int], Callable[[int], None]]:
    """Of as many blocks as a layer's number says."""
    blocks, numbers = torch.empty(4, 1 << 17, dtype=torch.uint8), torch.empty(16, dtype=torch.int64)
    scratch, sums = checksum_scratch(16, blocks), torch.empty(16, dtype=torch.int64)

    def first(count: int) -> Callable[[int], None]:
        of_blocks = BlockChecksums(blocks, numbers, scratch, sums)
        of_blocks(count)
        return of_blocks

    return first


CASES = {
    "decode": lambda: decode(pool()),
    "decode_fp8": lambda: decode(fp8_pool()),
    "prefill": prefill,
    "gluon": gluon,
    "widen": widened,
    "latent_decode": latent_decode,
    "latent_prefill": latent_prefill,
    "checksums": checksums,
}


def count_lookups() -> None:
    run = JITFunction.run

    def counted(self: JITFunction, *args: Any, **options: Any) -> object:
        lookups.append(self.__name__)
        return run(self, *args, **options)

    JITFunction.run = counted


def main() -> None:
    driver.set_active(RecordingDevice())
    count_lookups()
    for name, case in CASES.items():
        first = case()
        for layer in LAYERS:
            first(layer)
        alone = launched[:]
        launched.clear()
        lookups.clear()
        of_layer = first(LAYERS[0])
        for layer in LAYERS[1:]:
            of_layer(layer)
        print(json.dumps({"case": name, "launches": len(launched), "lookups": len(lookups), "same": launched == alone}))
        launched.clear()


if __name__ == "__main__":
    main()
