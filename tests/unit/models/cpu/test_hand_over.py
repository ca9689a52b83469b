"""KV that a worker of one size computed, and a decode worker of another goes on with: the tokens of one process.

Ranks and stages are threads and calls here; tests/integration/test_ranks.py has processes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.kvtransfer.blocks.copies import HostCopies, Pair
from baton.kvtransfer.blocks.pool import BlockPool
from baton.kvtransfer.blocks.stage_pools import StagePools
from baton.kvtransfer.planes.base import ChunkKey
from baton.kvtransfer.planes.shm import ShmPlane
from baton.kvtransfer.reshard import Cut
from baton.models.batch import Draw, Launched, Row
from baton.models.cpu.runner import ModelRunner
from baton.models.partition import ONLY_STAGE, Stage
from baton.node.messages.control import SamplingSpec
from baton.testing.rank_threads import RankThreads
from baton.worker.host_planes import planes_by_layer
from baton.worker.kv_layout import layout_of

SHAPE = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 96}
BLOCK_TOKENS, NUM_BLOCKS, TOKENS = 16, 8, 5
SPEC = SamplingSpec(max_tokens=TOKENS, temperature=0.7, seed=11)
PROMPT = [3 + 5 * place % 90 for place in range(40)]
SOURCE, TARGET = [5, 1, 2], [0, 7, 3]


def load(folder: Path, ranks: int, stage: Stage = ONLY_STAGE):  # type: ignore[no-untyped-def]
    if ranks == 1:
        return ModelRunner.load(folder, stage=stage)
    return RankThreads(lambda peers: ModelRunner.load(folder, peers=peers, stage=stage), ranks)


def row(known: list[int], start: int, blocks: list[int]) -> Row:
    return Row(known[start:], start, blocks, Draw(SPEC, known, len(PROMPT), len(known) - len(PROMPT)))


def decode(runner, known: list[int], blocks: list[int]) -> list[int]:  # type: ignore[no-untyped-def]
    """The tokens from the second on."""
    while len(known) < len(PROMPT) + TOKENS:
        (drawn,) = runner.step([row(known, len(known) - 1, blocks)])
        known = [*known, *drawn.token_ids]
    return known[len(PROMPT) :]


class Prefill:
    """Stages of ranks, each stage over a pool of its own."""

    def __init__(self, folder: Path, ranks: int, stages: int) -> None:
        self.stages = [load(folder, ranks, Stage(index, stages)) for index in range(stages)]
        first = self.stages[0]
        layout = layout_of(first.config, first.kv_format, BLOCK_TOKENS)
        self.cut = Cut.even(layout.num_units, 1, layout.num_layers, stages)
        self.pools = StagePools(self.cut, layout, NUM_BLOCKS)
        for stage, pool in zip(self.stages, self.pools.pools, strict=True):
            stage.bind_pool(pool.tensor)

    def first_token(self) -> int:
        entering, rows = None, [row(PROMPT, 0, SOURCE)]
        for stage in self.stages[:-1]:
            entering = stage.advance(rows, entering)
        launched: Launched = self.stages[-1].launch(rows, entering)
        (drawn,) = launched.read()
        assert drawn is not None
        return drawn.token_ids[0]


def by_planes(prefill: Prefill, pool: BlockPool, cut: Cut) -> None:
    def make(name: str, memory, identity: str) -> ShmPlane:  # type: ignore[no-untyped-def]
        return ShmPlane(memory)

    (sender,) = planes_by_layer(prefill.cut, prefill.pools.pools, prefill.pools.layers_digest, ["shm"], make, "prefill")
    (receiver,) = planes_by_layer(cut, [pool], pool.layers_digest, ["shm"], make, "decode")
    assert receiver.reaches(sender.describe())
    receiver.connect("prefill", sender.describe())
    receiver.post_receive("prefill", ChunkKey(b"x" * 16, 0, 0), SOURCE, TARGET)
    assert [done.ok for done in receiver.poll()] == [True]
    receiver.close()


def by_store(prefill: Prefill, pool: BlockPool, cut: Cut) -> None:
    written, read = HostCopies(prefill.pools), HostCopies(pool)
    for theirs, ours in zip(SOURCE, TARGET, strict=True):
        record = memoryview(bytearray(pool.block_bytes))
        digest = written.ended(written.begin_save([Pair(theirs, record)]))
        assert read.ended(read.begin_load([Pair(ours, record)])) == digest


@pytest.mark.parametrize(
    ("ranks", "stages", "decode_ranks", "move"),
    [
        (2, 1, 1, by_planes),
        (1, 1, 2, by_planes),
        (2, 1, 4, by_planes),
        (1, 2, 2, by_planes),
        (2, 2, 4, by_planes),
        (2, 1, 4, by_store),
        (1, 2, 1, by_store),
    ],
)
def test_answers_are_those_of_one_process(make_model, ranks, stages, decode_ranks, move):
    """Guards against heads and layers that the next worker looks for elsewhere, whatever the sizes of the two."""
    folder = make_model("llama", **SHAPE).folder
    alone = Prefill(folder, 1, 1)
    expected = decode(alone.stages[0], [*PROMPT, alone.first_token()], SOURCE)
    prefill, decoder = Prefill(folder, ranks, stages), load(folder, decode_ranks)
    layout = layout_of(decoder.config, decoder.kv_format, BLOCK_TOKENS)
    pool = BlockPool(layout, NUM_BLOCKS)
    decoder.bind_pool(pool.tensor)
    token = prefill.first_token()
    move(prefill, pool, Cut.even(layout.num_units, 1, layout.num_layers))
    assert decode(decoder, [*PROMPT, token], TARGET) == expected
