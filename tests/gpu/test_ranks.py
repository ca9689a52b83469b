"""Two ranks on one GPU draw what one rank draws. Run it in a separate process, as tests/gpu/test_runner.py says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels.triton.norm import add_rms_norm
from baton.models.batch import Draw, Row
from baton.models.check import recipe_for
from baton.models.config import ModelConfig
from baton.models.cpu.decoder import DenseDecoder
from baton.models.cpu.runner import ModelRunner
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.peers import DevicePeers, InboxShape, RankMemory
from baton.models.cuda.queue import CudaQueue
from baton.models.cuda.rank_adapters import RankSlots
from baton.models.cuda.runner import CudaRunner
from baton.models.eagle_config import EagleConfig, read_eagle
from baton.models.eagle_weights import EagleWeights, load_eagle
from baton.models.layer_weights import Weights
from baton.models.partition import Rank, part_of
from baton.models.weights import load_weights
from baton.node.messages.control import SamplingSpec
from baton.node.modelhub import locate_model
from baton.testing.coded_inputs import RUNS, with_coded_inputs
from baton.testing.device_ranks import DeviceRanks
from baton.tests.gpu.test_runner import LONGEST, generate, prompts, table
from baton.tests.unit.models.cuda.ahead import Ahead, always_draft
from baton.tests.unit.models.cuda.merged import random_adapter, with_vocabulary
from baton.tests.unit.models.eagle_folders import write_pair

pytestmark = pytest.mark.gpu

MAX_ROWS, TOKENS, BLOCK = 64, 24, 64
INPUTS = {"fp8": (torch.float8_e4m3fn, None), "fp8_block": (torch.float8_e4m3fn, RUNS)}
"""Codes of rows, and elements that share a scale."""
EDITED = {"temperature": 0.8, "top_p": 0.9, "frequency_penalty": 0.4, "logprobs": True, "top_logprobs": 2}


def pool(config: ModelConfig, dtype: torch.dtype) -> torch.Tensor:
    num_blocks = MAX_ROWS * -(-LONGEST // BLOCK) + 1
    shape = (num_blocks, config.num_kv_heads, config.num_layers, 2, BLOCK, config.head_dim)
    return torch.zeros(shape, dtype=dtype, device="cuda:0")


def queues(count: int) -> list[CudaQueue]:
    """Of ranks on one GPU. Kernels that start before the one ahead of them has ended would take the room in which
    another rank's have to run."""
    made = [CudaQueue(0) for _ in range(count)]
    for queue in made:
        queue.pdl = False
    return made


def make(
    dtype: torch.dtype, count: int, quantization: str | None = None, **of_limits: int
) -> tuple[CudaRunner, DeviceRanks]:
    """One rank, and `count` that have computed everything by themselves, so that nothing is compiled or loaded while
    one waits for another."""
    folder = locate_model("demo")
    config = ModelConfig.from_folder(folder)
    limits, recipe = StepLimits(MAX_ROWS, 2048, **of_limits), recipe_for(quantization, config)

    def load(rank: Rank):
        options = {"pack": False, "rank": rank, "recipe": recipe, "keep_quantised": recipe is not None}
        return load_weights(config, folder, dtype, "cuda:0", **options)

    one = CudaRunner(config, load(Rank()), CudaQueue(0), limits, LONGEST)
    one.bind_pool(pool(config, dtype), LONGEST)
    ranks = DeviceRanks(config, load, queues(count), limits, LONGEST)

    def alone(index: int) -> None:
        runner = ranks.runners[index]
        runner.warm_up()
        for spec in (EDITED, {"temperature": 0.0}):
            generate(runner, prompts(MAX_ROWS), 3, 200, **spec)
        if limits.most_drafts:
            verify(runner, prompts(16), [[*prompt, *prompt] for prompt in prompts(16)]).generated(0)

    ranks.bind_pools([pool(part_of(config, Rank(0, count)), dtype) for _ in range(count)], LONGEST, alone)
    return one, ranks


def exact_logits(
    rows: list[Row], quantization: str | None, inputs: tuple[torch.dtype, int | None] | None = None
) -> torch.Tensor:
    """In float32 on the CPU. inputs: codes into which those of all products are put."""
    folder = locate_model("demo")
    config = ModelConfig.from_folder(folder)
    weights = load_weights(config, folder, torch.float32, pack=False, recipe=recipe_for(quantization, config))
    if inputs is not None:
        weights = with_coded_inputs(weights, *inputs)
    runner = ModelRunner(config, DenseDecoder(config, weights), torch.float32)
    runner.bind_pool(torch.zeros(runner.kv_shape(160, 16)))
    return runner.compute([row._replace(blocks=range(40 * row.slot, 40 * row.slot + 40)) for row in rows])[1]


def verify(runner: CudaRunner | DeviceRanks, made: list[list[int]], predictions: list[list[int]]) -> Ahead:
    """TOKENS after each prompt, with drafts of these predictions."""
    run = Ahead(runner, most_drafts=3)
    for slot, prompt in enumerate(made):
        run.predictions[slot] = predictions[slot]
        run.start(slot, prompt, table(slot))
    while live := [slot for slot in range(len(made)) if len(run.known[slot]) < len(made[slot]) + TOKENS]:
        run.launch(live, chunk=200)
    return run


@pytest.mark.parametrize("width", [32, 256, 2048])
@pytest.mark.parametrize("count", [2, 4])
def test_no_sum_has_words_of_an_exchange_before(count, width):
    """Guards what a program takes for come: rows with fewer columns than it had threads were once read by two threads
    each, one of which may see words before they come. Ranks come late in turn, so that all wait often."""
    exchanges, rows = 2000, 8
    shapes = (
        InboxShape(rows, width, torch.int32, sums=True),
        InboxShape(8, 1, torch.int64),
        InboxShape(1, 4, torch.int32),
    )
    layouts = [RankMemory(Rank(index, count), shapes) for index in range(count)]
    memories = [torch.zeros(layout.size_bytes, dtype=torch.uint8, device="cuda:0") for layout in layouts]
    peers = [DevicePeers(layout, memory, 8) for layout, memory in zip(layouts, memories, strict=True)]
    numbers = torch.arange(exchanges, device="cuda:0")[:, None, None] % 32
    columns = torch.arange(width, device="cuda:0") % 16
    parts = [((numbers + columns) * (index + 1)).bfloat16().expand(-1, rows, -1).contiguous() for index in range(count)]
    found = [torch.zeros_like(part) for part in parts]
    weight, outs = torch.ones(width, device="cuda:0").bfloat16(), [torch.empty_like(part[0]) for part in parts]
    streams = [torch.cuda.Stream() for _ in range(count)]

    def exchange(rank: int, number: int) -> None:
        add_rms_norm(parts[rank][number], found[rank][number], weight, 1e-5, outs[rank], ranks=peers[rank].sums)
        peers[rank].meet()

    for rank in range(count):
        exchange(rank, 0)  # by itself: compiles
    found[:] = [torch.zeros_like(part) for part in parts]
    for each in peers:
        each.connect([memory.data_ptr() for memory in memories])
    for number in range(exchanges):
        for rank, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if number % count == rank:
                    torch.cuda._sleep(997 * number % 20_000)
                exchange(rank, number)
    torch.cuda.synchronize()
    expected = sum(part.float() for part in parts).bfloat16()
    for rank in range(count):
        peers[rank].bring()
        torch.cuda.synchronize()
        peers[rank].check()
        assert torch.equal(found[rank], expected), rank


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_on_one_gpu_draw_what_one_rank_draws(count):
    """Guards exchanges between kernels that run side by side, in captured steps and in prompts, over many steps: a word
    that was overwritten or taken too early, and ranks that draw different tokens."""
    one, ranks = make(torch.float32, count)
    made = prompts(MAX_ROWS)
    for spec in ({"temperature": 0.0}, {"temperature": 0.9}, EDITED):
        found, expected = (generate(runner, made, TOKENS, 200, **spec) for runner in (ranks, one))
        different = [index for index in range(len(made)) if found[index] != expected[index]]
        assert not different, (spec, different)


def test_ranks_on_one_gpu_accept_drafts_of_one_another():
    """Guards ranks that hold or accept other drafts, or run a step of another size: they would agree on no token."""
    one, ranks = make(torch.float32, 2, most_drafts=3)
    made = prompts(16)
    expected = generate(one, made, TOKENS, 200, temperature=0.0)
    run = verify(ranks, made, [[*prompt[-3:], *tokens] for prompt, tokens in zip(made, expected, strict=True)])
    assert [run.generated(slot)[:TOKENS] for slot in range(16)] == [tokens[:TOKENS] for tokens in expected]
    assert run.num_accepted > TOKENS


def test_ranks_on_one_gpu_compute_their_parts_of_a_draft(tmp_path):
    """Guards exchanges inside captured chains of drafts: the draft equals its model, so that all of its tokens are
    right."""
    folder, draft, count = tmp_path / "model", tmp_path / "draft", 2
    write_pair(folder, draft)
    config = ModelConfig.from_folder(folder)
    eagle, limits = read_eagle(draft, config), StepLimits(MAX_ROWS, 2048)
    made = [[token % config.vocab_size for token in prompt] for prompt in prompts(8, 60)]

    def load(rank: Rank) -> Weights:
        return load_weights(config, folder, torch.float32, "cuda:0", pack=False, rank=rank)

    def with_draft(rank: Rank, weights: Weights) -> tuple[EagleConfig, EagleWeights]:
        return eagle, load_eagle(eagle, draft, weights, "auto", pack=False, rank=rank)

    one = CudaRunner(config, load(Rank()), CudaQueue(0), limits, LONGEST)
    one.bind_pool(pool(config, torch.float32), LONGEST)
    limits = StepLimits(MAX_ROWS, 2048, most_drafts=3)
    ranks = DeviceRanks(config, load, queues(count), limits, LONGEST, draft=with_draft)

    def answers(runner: CudaRunner | DeviceRanks, most: int) -> Ahead:
        run = Ahead(runner, most_drafts=most)
        for slot, prompt in enumerate(made):
            run.start(slot, prompt, table(slot), temperature=slot % 2 * 0.8, seed=slot + 1)
        while live := [slot for slot in range(8) if len(run.known[slot]) < len(made[slot]) + TOKENS]:
            run.launch(live, chunk=200)
        return run

    def alone(index: int) -> None:
        ranks.runners[index].warm_up()
        always_draft(ranks.runners[index])
        answers(ranks.runners[index], 3).generated(0)

    part = part_of(config, Rank(0, count))
    part = replace(part, num_layers=config.num_layers + 1)  # the draft's
    ranks.bind_pools([pool(part, torch.float32) for _ in range(count)], LONGEST, alone)
    expected, found = answers(one, 0), answers(ranks, 3)
    assert [found.generated(slot)[:TOKENS] for slot in range(8)] == [
        expected.generated(slot)[:TOKENS] for slot in range(8)
    ]
    assert found.num_verified > TOKENS and found.num_accepted > 0.9 * found.num_verified


@pytest.mark.parametrize("vocabulary", [False, True])
def test_ranks_on_one_gpu_compute_with_their_parts_of_an_adapter(vocabulary):
    """Guards rows and columns of an adapter that are another rank's, in prompts and in captured steps."""
    one, ranks = make(torch.float32, 2, adapter_slots=2, max_rank=32, adapter_vocabulary=vocabulary)
    adapter, made = random_adapter(one.config, [24, 8], 3), prompts(8)
    if vocabulary:
        adapter = with_vocabulary(adapter, one.config)
    slots = RankSlots(one.config, [runner.adapters for runner in ranks.runners])
    found = []
    for runner, own in ((one, one.adapters), (ranks, slots)):
        filled = own.fill(1, own.prepare(adapter))
        while not filled.done:
            pass
        run = Ahead(runner)
        run.adapters = {slot: 1 for slot in range(0, 8, 2)}
        for slot, prompt in enumerate(made):
            run.start(slot, prompt, table(slot))
        while any(len(run.known[slot]) < len(made[slot]) + TOKENS for slot in range(8)):
            run.launch(list(range(8)), chunk=200)
        found.append([run.generated(slot)[:TOKENS] for slot in range(8)])
    assert found[0] == found[1]


@pytest.mark.parametrize("quantization", [None, "fp8", "fp8_block", "int4"])
def test_two_ranks_are_as_exact_as_one(quantization):
    """Guards against a part that is left out or counted twice, where roundings let tokens differ: in bfloat16, and with
    weights whose codes and scales are cut. Two ranks round other sums, and put other rows into codes, than one: of the
    demo model's blocks of 128 x 128 one rank multiplies none in codes, and of two each those of its `o`."""
    one, ranks = make(torch.bfloat16, 2, quantization)
    draw = Draw(SamplingSpec(max_tokens=9, temperature=0.0), (), 0, 0)
    rows = [Row(prompt, 0, table(slot), draw, slot) for slot, prompt in enumerate(prompts(4))]
    exact = exact_logits(rows, quantization)

    def error(logits: torch.Tensor) -> float:
        return float((logits.float().cpu() - exact).norm() / exact.norm())

    errors = [error(one.logits(rows))]
    if quantization in INPUTS:
        errors.append(error(exact_logits(rows, quantization, INPUTS[quantization])))
    allowed = 1.3 * max(errors)
    first, second = ranks.all(lambda index: ranks.runners[index].logits(rows).clone(), waits=True)
    assert torch.equal(first, second) and error(first) <= allowed
