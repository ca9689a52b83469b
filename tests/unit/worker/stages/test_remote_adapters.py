"""Adapters of stages on several hosts: each computes with its part, which comes over its link."""

from __future__ import annotations

import gc
from dataclasses import replace

import msgspec
import pytest
import torch

from baton.models.adapters.adapter import Adapter, LowRank
from baton.models.adapters.flat import Directory, PairPlace, Span
from baton.models.adapters.peft import read_adapter
from baton.models.batch import Draw, Row
from baton.models.cpu.runner import ModelRunner
from baton.node.errors import AdapterError, PeerLost
from baton.node.messages.control import SamplingSpec
from baton.node.modelhub import locate_model
from baton.testing.adapter_folders import write_adapter
from baton.tests.unit.models.cpu.test_stages import BLOCK_TOKENS, NUM_BLOCKS, Pipeline
from baton.worker.stages.messages import GivenFill, decode_rows
from baton.worker.stages.remote.adapters import GivenAdapters, GivenPart, SpreadSlots

COUNT = 3
GREEDY = Draw(SamplingSpec(max_tokens=1, temperature=0.0), (), 0, 0)
OPTIONS = {"max_loras": 2, "max_lora_rank": 8}


class Hosts:
    """Stages of the demo model, and the links between them: what is sent is there at once."""

    def __init__(self) -> None:
        self.pipeline = Pipeline(locate_model("demo"), COUNT, **OPTIONS)
        self.pipeline.bind_pools()
        first, *others = self.pipeline.stages
        self.given = {number: GivenAdapters(each.adapters) for number, each in enumerate(others, start=1)}
        self.fills: list[bytes] = []
        self.parcels: list[tuple[int, int]] = []
        """Stage and size of the data."""
        self.forgotten: list[int] = []
        self.slots = SpreadSlots(first.adapters, COUNT, self, self)

    def give_adapter(self, stage: int, record: bytes, data: memoryview) -> None:
        self.parcels.append((stage, len(data)))
        self.given[stage].take(record, bytearray(data))

    def forget_adapter(self, number: int) -> None:
        self.forgotten.append(number)
        for each in self.given.values():
            each.forget(number)

    def send(self, record: bytes, data: bytes | memoryview = b"") -> None:
        self.fills.append(record)

    def receive(self, wait_s: float | None = None) -> tuple[bytes, bytearray]:
        raise NotImplementedError

    def shut(self) -> None: ...

    def pass_fills_on(self) -> None:
        """To all stages, as steps get to them."""
        for record in self.fills:
            for each in self.given.values():
                each.fill(decode_rows(record))  # type: ignore[arg-type]
        self.fills.clear()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Adapter:
    """Of all layers, the embedding, the head and a norm of the middle stage."""
    runner = ModelRunner.load(locate_model("demo"))
    read = read_adapter(write_adapter(tmp_path_factory.mktemp("adapter"), runner.config), runner.config)
    hidden, vocab = runner.config.hidden_size, runner.config.vocab_size
    generator = torch.Generator().manual_seed(3)

    def pair(inputs: int, outputs: int) -> LowRank:
        return LowRank(*(torch.randn(shape, generator=generator) * 0.2 for shape in ((4, inputs), (outputs, 4))))

    return replace(
        read,
        embedding=pair(vocab, hidden),
        lm_head=(pair(hidden, vocab),),
        norms={8: torch.rand(hidden, generator=generator)},
    )


def serve(runner: ModelRunner | Pipeline, slot: int | None) -> list[tuple[int, ...]]:
    """Two chunks of a prompt with the adapter beside one without."""
    prompt, half = [(7 * place) % 4000 for place in range(40)], NUM_BLOCKS // 2
    tables = [list(range(half)), list(range(half, 2 * half))]
    runner.launch([Row(prompt[:17], 0, tables[0], None, adapter=slot), Row(prompt[:9], 0, tables[1], None)])
    rows = [Row(prompt[17:], 17, tables[0], GREEDY, adapter=slot), Row(prompt[9:], 9, tables[1], GREEDY)]
    return [drawn.token_ids for drawn in runner.launch(rows).read() if drawn]


def test_stages_compute_with_their_parts_what_one_process_computes(adapter):
    """Guards against layers, embeddings, norms and heads of another stage, bit for bit, and parts that go to stages
    which do not need them."""
    alone, hosts = ModelRunner.load(locate_model("demo"), **OPTIONS), Hosts()
    pool = torch.zeros(alone.kv_shape(NUM_BLOCKS, BLOCK_TOKENS))
    alone.bind_pool(pool)
    alone.adapters.fill(1, alone.adapters.prepare(adapter))
    prepared = hosts.slots.prepare(adapter)
    assert hosts.slots.fill(1, prepared).done
    hosts.pass_fills_on()
    drawn = serve(hosts.pipeline, 1)
    assert drawn == serve(alone, 1) and drawn[0] != drawn[1]
    assert torch.equal(torch.cat(hosts.pipeline.pools, 2), pool)
    assert [stage for stage, _ in hosts.parcels] == [1, 2]
    assert (
        sum(size for _, size in hosts.parcels) + prepared.size_bytes < 1.1 * alone.adapters.prepare(adapter).size_bytes
    )


def test_what_is_in_a_slot_outlives_what_is_forgotten(adapter):
    """Guards against an adapter that leaves a stage with the first one's memory while steps still use it, memory that
    grows with each adapter, and a late fill that ends its worker."""
    hosts = Hosts()
    prepared = hosts.slots.prepare(adapter)
    hosts.slots.fill(0, prepared)
    hosts.pass_fills_on()
    before = serve(hosts.pipeline, 0)
    del prepared
    gc.collect()
    assert hosts.forgotten == [1] and not any(each._kept for each in hosts.given.values())
    assert serve(hosts.pipeline, 0) == before
    hosts.slots.fill(1, hosts.slots.prepare(adapter))
    assert hosts.forgotten == [1, 2], "before the stages have come to the fill"
    hosts.pass_fills_on()
    assert serve(hosts.pipeline, 0) == before


def test_an_adapter_that_does_not_fit_is_sent_to_no_stage(adapter):
    """Guards against a refused adapter that stages keep: its rank is too large in the last one's part only."""
    hosts = Hosts()
    head = LowRank(torch.zeros(16, 256), torch.zeros(4096, 16))
    with pytest.raises(AdapterError, match="rank 16, more than --max-lora-rank 8"):
        hosts.slots.prepare(replace(adapter, lm_head=(head,)))
    assert hosts.parcels == []


@pytest.mark.parametrize(
    "record",
    [
        b"\xc1",
        msgspec.msgpack.encode(
            GivenPart(
                1,
                Directory(
                    bytes(32), 8, (PairPlace(0, "o", 0, 1, Span(0, (4, 4)), Span(64, (4, 1)), None),), None, None, {}
                ),
            )
        ),
    ],
    ids=["no record", "numbers behind the end"],
)
def test_what_is_no_part_of_an_adapter_is_the_loss_of_the_link(record):
    """Guards against an error of a library in the middle of a step."""
    given = GivenAdapters(ModelRunner.load(locate_model("demo"), **OPTIONS).adapters)
    with pytest.raises(PeerLost, match="no part of an adapter"):
        given.take(record, bytearray(64))
    given.fill(GivenFill(0, 1))
