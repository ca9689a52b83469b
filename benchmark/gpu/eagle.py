"""Times steps with an EAGLE-3 draft of the shape of EAGLE-3 for LLaMA 3.1 8B, in turns with steps without drafts.

Weights are random, so that no draft is right: how many are accepted is simulated. Before drafts are compared, some are
made equal to what was drawn, each with the same chance given that those before it are; the rest are made wrong. What a
step computes does not depend on it. `chain`: GPU time of proposing alone. `eagle`: tokens a second with drafts and
without, and tokens of a row and step.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence

import torch

from baton.benchmark.gpu.decode import blocks_for
from baton.benchmark.gpu.runners import RandomKv, load_shape, random_pool
from baton.benchmark.harness.json_lines import JsonLines
from baton.benchmark.harness.shapes import SHAPES
from baton.models.batch import Draw, Launched, Row
from baton.models.config import ModelConfig
from baton.models.cuda.drafts import DraftSlots
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.queue import CudaQueue
from baton.models.cuda.runner import CudaRunner
from baton.models.eagle_config import read_eagle
from baton.models.eagle_weights import load_eagle
from baton.models.layer_weights import Weights
from baton.node.messages.control import SamplingSpec

DRAFT = "llama-3.1-8b/eagle3"
CONTEXT, MOST_ROWS, STEPS, TURNS = 1024, 8, 60, 3
CHANCES = {3: 0.8105, 4: 0.7275, 5: 0.6914}
"""Of a draft, given those before it, by the number of drafts: 2 of them are accepted in the mean, so a step gives 3
tokens."""
CELLS = ((1, 3), (8, 3), (1, 4), (1, 5), (8, 4))


class Acceptance:
    """Makes drafts right with a chance: `rows` rows of a step, each slot's number its row's."""

    def __init__(self, drafts: DraftSlots, rows: int) -> None:
        self._drafts, self._rows = drafts, rows
        device, most = drafts.results.device, drafts.most_drafts
        self._uniforms = torch.rand(4096, rows, most, device=device)
        self._turn = torch.zeros(1, dtype=torch.int64, device=device)
        self.chance = torch.full((1,), 0.8, device=device)

    def __call__(self, drawn: torch.Tensor) -> None:
        drafts, rows = self._drafts, min(self._rows, len(drawn))
        most = drafts.most_drafts
        own = torch.arange(rows, device=drawn.device)[:, None]
        later = drafts.places.first[:rows, None] + torch.arange(most, device=drawn.device)[None] - 1
        places = torch.cat((own, later[:, 1:]), 1).clamp(0, len(drawn) - 1)
        tokens = drawn[places]
        right = (self._uniforms.index_select(0, self._turn)[0, :rows] < self.chance).int().cumprod(1).bool()
        self._turn.add_(1).remainder_(4096)
        wanted = torch.where(right, tokens, (tokens + 1) % 1000)
        taken = (drafts.places.taken[:rows] >= 0)[:, None]
        slots = drafts.kept.drafts[:rows]
        slots.copy_(torch.where(taken, wanted, slots))


class EagleRows:
    """Rows that decode from random contexts, in the slots of their numbers."""

    def __init__(self, runner: CudaRunner, rows: int, num_blocks: int, most: int) -> None:
        chance = random.Random(3)
        width = blocks_for(CONTEXT + STEPS * (most + 1) + 2 * most + 2)
        blocks = chance.sample(range(num_blocks), rows * width)
        self._tables = [blocks[row * width : (row + 1) * width] for row in range(rows)]
        self._known = [[chance.randrange(100_000) for _ in range(CONTEXT)] for _ in range(rows)]
        self._runner, self._most = runner, most
        self._sampling = SamplingSpec(max_tokens=4096, temperature=0.0)
        self.tokens = 0
        self.gpu_s: list[float] = []

    def run(self) -> float:
        """Seconds that STEPS steps take, without the first that have no drafts yet."""
        starts, given = [CONTEXT - 1] * len(self._known), True
        in_flight: list[Launched] = []
        warm, began_at = 8, time.perf_counter()
        for step in range(STEPS + warm):
            if step == warm:
                while in_flight:
                    self._read(in_flight.pop(0), starts)
                self.tokens, began_at = 0, time.perf_counter()
            batch = []
            for row, known in enumerate(self._known):
                draw = Draw(self._sampling, known, CONTEXT, 1)
                tokens = known[-1:] if given else ()
                batch.append(Row(tokens, starts[row], self._tables[row], draw, row, most_drafts=self._most))
                starts[row] += 1
            given = False
            in_flight.append(self._runner.launch(batch))
            if len(in_flight) > self._runner.run_ahead:
                self._read(in_flight.pop(0), starts)
        while in_flight:
            self._read(in_flight.pop(0), starts)
        return time.perf_counter() - began_at

    def _read(self, launched: Launched, starts: list[int]) -> None:
        for row, drawn in enumerate(launched.read()):
            assert drawn is not None, "all rows draw"
            starts[row] += max(0, len(drawn.token_ids) - 1)
            self.tokens += len(drawn.token_ids)
        assert launched.device_time is not None, "a GPU measures its steps"
        self.gpu_s.append(launched.device_time.busy_s)


def make_pair(lines: JsonLines, shape: str, most: int) -> tuple[CudaRunner, CudaRunner, Acceptance, int]:
    """A runner without drafts and one with, over one pool, and the latter's acceptance; blocks of the pool."""
    config, weights = load_shape(lines, shape)
    num_blocks = MOST_ROWS * blocks_for(CONTEXT + (STEPS + 16) * (most + 2)) + 8
    pools = [random_pool(config, num_blocks, has_draft=has) for has in (False, True)]
    off = _runner(config, weights, pools[0], StepLimits(MOST_ROWS, 2048), None)
    on = _runner(config, weights, pools[1], StepLimits(MOST_ROWS, 2048, most_drafts=most), DRAFT)
    assert on.drafts is not None, "a runner with drafts"
    acceptance = Acceptance(on.drafts, MOST_ROWS)
    on.drafts.before_accept = acceptance
    for runner, pool in ((off, pools[0]), (on, pools[1])):
        began_at = time.monotonic()
        runner.bind_pool(pool.tensors.data, CONTEXT + 1024)
        runner.warm_up()
        lines.put("captured", drafts=runner is on, seconds=round(time.monotonic() - began_at, 1))
    return off, on, acceptance, num_blocks


def _runner(config: ModelConfig, weights: Weights, pool: RandomKv, limits: StepLimits, draft: str | None) -> CudaRunner:
    eagle = None
    if draft is not None:
        read = read_eagle(SHAPES / draft, config)
        eagle = (read, load_eagle(read, SHAPES / draft, weights, "dummy", pack=False))
    return CudaRunner(config, weights, CudaQueue(0), limits, CONTEXT + 1024, kv_format=pool.format, eagle=eagle)


def measure_eagle(lines: JsonLines, shape: str) -> None:
    for most in dict.fromkeys(most for _, most in CELLS):
        off, on, acceptance, num_blocks = make_pair(lines, shape, most)
        acceptance.chance.fill_(CHANCES[most])
        for rows in (rows for rows, each in CELLS if each == most):
            _measure(lines, (off, on), rows, most, num_blocks)
        del off, on, acceptance
        torch.cuda.empty_cache()


def _measure(lines: JsonLines, runners: Sequence[CudaRunner], rows: int, most: int, num_blocks: int) -> None:
    rates: tuple[list[float], list[float]] = ([], [])
    gpu: tuple[list[float], list[float]] = ([], [])
    a_step = 0.0
    for _ in range(TURNS):
        for number, runner in enumerate(runners):
            streams = EagleRows(runner, rows, num_blocks, most * number)
            rates[number].append(_rate(streams))
            gpu[number].append(statistics.median(streams.gpu_s[8:]))
            a_step = streams.tokens / STEPS / rows
    off, on = (statistics.median(each) for each in rates)
    off_ms, on_ms = (statistics.median(each) * 1e3 for each in gpu)
    lines.put(
        "eagle", rows=rows, drafts=most, speedup=on / off, tokens_s=on, off_tokens_s=off, tokens_a_step=a_step,
        step_ratio=on_ms / off_ms, off_ms=off_ms, on_ms=on_ms,
    )  # fmt: skip


def _rate(streams: EagleRows) -> float:
    seconds = streams.run()
    return streams.tokens / seconds
