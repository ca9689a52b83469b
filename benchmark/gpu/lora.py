"""Times steps with adapters on the GPU at hand, in turns with steps of the same runner without: random weights and KV.

`adapted_step`: a cell ROWSxADAPTERS is a decode step of so many rows, each of which has one of so many adapters;
`ratio` is to the step without adapters that ran beside it, the median of all turns. `filled_slot`: from RAM to a slot,
alone and beside steps, and what it adds to them. `traffic`: tokens a second of requests with adapters drawn from many,
evenly and by Zipf's law, whose slots are filled as they come; `ratio` is to the same requests without adapters.
`adapted_mixed_step`: such a step in which the last row is a prompt, launched op by op; `host_ms` is its launch.
`breakdown`, with --breakdown: what a layer's time goes to (adapter_breakdown).
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate

import torch

from baton.benchmark.gpu.adapter_breakdown import report
from baton.benchmark.gpu.decode import GREEDY, DecodeBatch, blocks_for, gpu_ms, step, step_ms
from baton.benchmark.gpu.runners import (
    BLOCK_TOKENS,
    PLAIN,
    QUANTIZATIONS,
    RandomKv,
    load_shape,
    make_runner,
    random_pool,
)
from baton.benchmark.gpu.step_breakdown import PASSES
from baton.benchmark.harness.json_lines import JsonLines
from baton.benchmark.harness.options import new_parser
from baton.models.adapters.adapter import Adapter, LayerAdapter, LowRank, Parts, adapted_products
from baton.models.adapters.fills import Fill, PreparedAdapter
from baton.models.batch import Draw, Launched, Row
from baton.models.config import ModelConfig
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.runner import CudaRunner

CELLS = "1x1,8x1,64x1,8x8,32x32,64x64"
IMAGES = 2
"""Adapters in RAM, each of which stands for many."""
PROMPT, ANSWER = 256, 128
"""Tokens of a request."""
FILLS = 20
MOST_TOKENS = 2048
MOST_PROMPTS = MOST_TOKENS // PROMPT - 1
"""In a step."""


def random_adapter(config: ModelConfig, rank: int, seed: int, *, vocabulary: bool, dora: bool) -> Adapter:
    """Of all products; vocabulary: of the embedding and the head too. dora: with magnitudes."""
    generator = torch.Generator().manual_seed(seed)

    def parts(inputs: int, outputs: Sequence[int]) -> Parts:
        def some(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).mul_(0.02)

        pairs = (LowRank(some(rank, inputs), some(each, rank)) for each in outputs)
        return tuple(pair._replace(row_scale=1 + some(len(pair.b))) if dora else pair for pair in pairs)

    layers = [
        LayerAdapter(**{name: parts(product.num_inputs, product.outputs) for name, product in products.items()})
        for products in adapted_products(config)
    ]
    adapter = Adapter(seed.to_bytes(32, "big"), tuple(layers))
    if not vocabulary:
        return adapter
    (embedding,), head = parts(config.vocab_size, [config.hidden_size]), parts(config.hidden_size, [config.vocab_size])
    return replace(adapter, embedding=embedding and embedding._replace(row_scale=None), lm_head=head)


class FillingBatch(DecodeBatch):
    """Rows of eight adapters, and a slot that is filled with each step."""

    def __init__(self, runner: CudaRunner, image: PreparedAdapter, context: int, num_blocks: int) -> None:
        super().__init__([context] * 8, num_blocks, num_adapters=8)
        self._adapters, self._image = runner.adapters, image

    def rows(self) -> list[Row]:
        self._adapters.fill(self._adapters.num_slots - 1, self._image)
        return super().rows()


class MixedBatch(DecodeBatch):
    """The last row is a prompt that begins anew in each step."""

    def rows(self) -> list[Row]:
        *decoding, last = super().rows()
        prompt = last._replace(token_ids=[1000] * PROMPT, start=0, draw=Draw(GREEDY, (), PROMPT, 0))
        return [*decoding, prompt]


def steps(lines: JsonLines, runner: CudaRunner, pool: RandomKv, cells: str, context: int, turns: int) -> None:
    for cell in cells.split(","):
        rows, adapters = map(int, cell.split("x"))
        found: list[tuple[float, float, float, float]] = []

        def batch(num_adapters: int, rows: int = rows) -> DecodeBatch:
            return DecodeBatch([context] * rows, pool.num_blocks, num_adapters=num_adapters)

        for _ in range(turns):
            base = step_ms(runner, batch(0))[0]
            ours = step_ms(runner, batch(adapters))[0]
            base_gpu = gpu_ms(runner, batch(0))
            ours_gpu = gpu_ms(runner, batch(adapters))
            found.append((base, ours, base_gpu, ours_gpu))
        base, ours, base_gpu, ours_gpu = (statistics.median(column) for column in zip(*found, strict=True))
        lines.put(
            "adapted_step",
            rows=rows,
            adapters=adapters,
            context=context,
            base_ms=round(base, 3),
            adapted_ms=round(ours, 3),
            ratio=round(statistics.median(each[1] / each[0] for each in found), 3),
            base_gpu_ms=round(base_gpu, 3),
            adapted_gpu_ms=round(ours_gpu, 3),
            gpu_ratio=round(statistics.median(each[3] / each[2] for each in found), 3),
        )


def mixed_steps(lines: JsonLines, runner: CudaRunner, pool: RandomKv, cells: str, context: int) -> None:
    for cell in cells.split(","):
        rows, adapters = map(int, cell.split("x"))
        values: dict[str, float] = {}
        for name, count in (("base", 0), ("adapted", adapters)):
            batch = partial(MixedBatch, [context] * rows, pool.num_blocks, num_adapters=count)
            wall, host = step_ms(runner, batch())
            values |= {f"{name}_ms": wall, f"{name}_gpu_ms": gpu_ms(runner, batch()), f"{name}_host_ms": host}
        rounded = {name: round(value, 3) for name, value in values.items()}
        lines.put("adapted_mixed_step", rows=rows, adapters=adapters, prompt=PROMPT, context=context, **rounded)


def breakdown(
    lines: JsonLines, runner: CudaRunner, pool: RandomKv, kinds: dict[type[DecodeBatch], str], context: int
) -> None:
    """Of the cells of each kind of step, with adapters and without. Call it last."""
    found: list[tuple[dict[str, object], Callable[[], object]]] = []
    for kind, cells in kinds.items():
        for cell in cells.split(","):
            rows, adapters = map(int, cell.split("x"))
            for count in (0, adapters):
                batch = kind([context] * rows, pool.num_blocks, PASSES, count)
                values: dict[str, object] = {
                    "rows": rows,
                    "adapters": count,
                    "step": "mixed" if kind is MixedBatch else "decode",
                }
                found.append((values, partial(step, runner, batch)))
    report(lines, runner.queue, runner.config.num_layers, found)


def fills(
    lines: JsonLines, runner: CudaRunner, pool: RandomKv, images: Sequence[PreparedAdapter], context: int
) -> None:
    """Into the last slot, which no row names."""
    slot = runner.adapters.num_slots - 1

    def fill() -> float:
        began_at = time.perf_counter()
        filled = runner.adapters.fill(slot, images[0])
        while not filled.done:
            pass
        return time.perf_counter() - began_at

    alone = [fill() for _ in range(FILLS)]
    plain = step_ms(runner, DecodeBatch([context] * 8, pool.num_blocks, num_adapters=8))[0]
    beside = step_ms(runner, FillingBatch(runner, images[0], context, pool.num_blocks))[0]
    lines.put(
        "filled_slot",
        mb=round(images[0].size_bytes / 1e6, 1),
        ms=round(statistics.median(alone) * 1e3, 3),
        worst_ms=round(max(alone) * 1e3, 3),
        step_ms=round(plain, 3),
        step_with_fill_ms=round(beside, 3),
    )


@dataclass(slots=True)
class Request:
    """One that runs."""

    adapter: int | None
    left: int = ANSWER
    computed: int = 0


@dataclass(slots=True)
class ResidentAdapters:
    """Which adapter each slot has, the least recently used first; as a worker keeps them."""

    runner: CudaRunner
    images: Sequence[PreparedAdapter]
    slots: dict[int, int] = field(default_factory=dict)
    filling: dict[int, Fill] = field(default_factory=dict)
    num_fills: int = 0

    def slot_of(self, adapter: int, used: set[int]) -> int | None:
        """Where rows may name it; None: not yet. used: adapters of steps that run."""
        if adapter in self.slots:
            self.slots[adapter] = slot = self.slots.pop(adapter)
            return slot if self.filling[slot].done else None
        slot = len(self.slots)
        if slot == self.runner.adapters.num_slots:
            idle = next((each for each in self.slots if each not in used), None)
            if idle is None:
                return None
            slot = self.slots.pop(idle)
        self.slots[adapter] = slot
        self.filling[slot] = self.runner.adapters.fill(slot, self.images[adapter % len(self.images)])
        self.num_fills += 1
        return None


def traffic(
    runner: CudaRunner, images: Sequence[PreparedAdapter], rows: int, names: Iterator[int | None], s: float
) -> tuple[float, int]:
    """Tokens a second of so many requests at a time, and how many slots were filled."""
    resident = ResidentAdapters(runner, images)
    width = -(-(PROMPT + ANSWER + 1) // BLOCK_TOKENS)
    running = [Request(next(names), left=1 + ANSWER * row // rows) for row in range(rows)]
    in_flight: deque[Launched] = deque()
    before: set[int] = set()  # adapters of the steps in flight
    tokens, began_at = 0, time.perf_counter()
    while time.perf_counter() - began_at < s:
        now = {each.adapter for each in running if each.adapter is not None}
        rows_of_step: list[Row] = []
        prompts = 0
        for slot, request in enumerate(running):
            place = None
            if request.adapter is not None:
                place = resident.slot_of(request.adapter, now | before)
                if place is None:
                    continue
            if request.computed == 0:
                if prompts == MOST_PROMPTS:
                    continue
                prompts += 1
            table = range(slot * width, (slot + 1) * width)
            done = ANSWER - request.left
            draw = Draw(GREEDY, (), PROMPT, done)
            given = [1000 + slot] * PROMPT if request.computed == 0 else []
            rows_of_step.append(Row(given, request.computed, table, draw, slot, adapter=place))
            request.computed += len(given) or 1
            request.left -= 1
            if request.left == 0:
                running[slot] = Request(next(names))
        if rows_of_step:
            in_flight.append(runner.launch(rows_of_step))
            tokens += len(rows_of_step)
        if in_flight and (not rows_of_step or len(in_flight) > runner.run_ahead):
            in_flight.popleft().read()
        before = now
    for launched in in_flight:
        launched.read()
    return tokens / (time.perf_counter() - began_at), resident.num_fills


def drawn(count: int, skewed: bool, seed: int = 0) -> Iterator[int]:
    """Adapters of requests: evenly, or adapter n in proportion to 1 / n."""
    chance = random.Random(seed)
    weights = list(accumulate(1 / (each + 1) if skewed else 1.0 for each in range(count)))
    while True:
        yield chance.choices(range(count), cum_weights=weights)[0]


def none() -> Iterator[None]:
    while True:
        yield None


def main(argv: Sequence[str]) -> int:
    parser = new_parser("lora", __doc__)
    parser.add_argument("--shape", default="llama-3.1-8b", help="a folder of benchmark/shapes")
    parser.add_argument("--cells", default=CELLS, help="rows x adapters, comma separated")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--max-rank", type=int, default=16, help="for which slots have room")
    parser.add_argument("--vocabulary", action="store_true", help="with pairs of the embedding and the head")
    parser.add_argument("--dora", action="store_true", help="with magnitudes")
    parser.add_argument("--slots", type=int, default=80, help="adapters that the GPU holds")
    parser.add_argument("--turns", type=int, default=3, help="of each cell, and of each kind of traffic")
    parser.add_argument("--adapters", type=int, default=1000, help="adapters of the traffic")
    parser.add_argument("--traffic-s", type=float, default=4.0, help="of each kind and turn; 0: none")
    parser.add_argument("--mixed-cells", default="64x64,64x1", help="as --cells, of steps with a prompt; empty: none")
    parser.add_argument("--breakdown", action="store_true", help="what a layer's time goes to, with the profiler")
    parser.add_argument("--deterministic", action="store_true", help="steps whose result does not depend on the batch")
    parser.add_argument("--quantization", default=PLAIN, choices=QUANTIZATIONS, help="format of the weights")
    options = parser.parse_args(argv)
    lines = JsonLines(options.output)
    most = max(64, *(int(cell.partition("x")[0]) for cell in options.cells.split(",")))
    longest = max(options.context, PROMPT + ANSWER) + 1
    limits = StepLimits(
        most,
        MOST_TOKENS,
        1,
        options.deterministic,
        adapter_slots=options.slots,
        max_rank=options.max_rank,
        adapter_vocabulary=options.vocabulary,
        adapter_magnitudes=options.dora,
    )
    config, weights = load_shape(lines, options.shape, options.quantization)
    pool = random_pool(config, most * blocks_for(longest) + 8)
    runner = make_runner(lines, config, weights, limits, pool, longest)
    began_at = time.monotonic()
    asked = {"vocabulary": options.vocabulary, "dora": options.dora}
    made = [random_adapter(config, options.rank, seed, **asked) for seed in range(IMAGES)]
    images = [runner.adapters.prepare(each) for each in made]
    lines.put("prepared", adapters=IMAGES, seconds=round(time.monotonic() - began_at, 2))
    for slot in range(options.slots):
        filled = runner.adapters.fill(slot, images[slot % IMAGES])
    while not filled.done:
        pass
    steps(lines, runner, pool, options.cells, options.context, options.turns)
    if options.mixed_cells:
        mixed_steps(lines, runner, pool, options.mixed_cells, options.context)
    fills(lines, runner, pool, images, options.context)
    if options.traffic_s:
        kinds: dict[str, Callable[[int], Iterator[int | None]]] = {
            "base": lambda turn: none(),
            "even": lambda turn: drawn(options.adapters, False, turn),
            "zipf": lambda turn: drawn(options.adapters, True, turn),
        }
        rates: dict[str, list[float]] = {kind: [] for kind in kinds}
        for turn in range(options.turns):
            for kind, names in kinds.items():
                rate, num_fills = traffic(runner, images, 64, names(turn), options.traffic_s)
                rates[kind].append(rate)
                ratio = round(rate / rates["base"][-1], 3)
                lines.put("traffic", kind=kind, rows=64, tokens_s=round(rate), fills=num_fills, ratio=ratio)
    if options.breakdown:
        kinds_of_steps: dict[type[DecodeBatch], str] = {DecodeBatch: options.cells}
        if options.mixed_cells:
            kinds_of_steps[MixedBatch] = options.mixed_cells
        breakdown(lines, runner, pool, kinds_of_steps, options.context)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
