"""One model on one GPU: launches steps that run ahead of the host, and reads them later.

    runner = CudaRunner(config, weights, queue, limits)      # weights and activations have their place now
    runner.bind_pool(pool, max_model_len, on_progress)       # captures the decode steps
    launched = runner.launch(rows); ...; launched.read()     # see models.batch

A row that continues what its slot drew last runs in a captured decode step, the parts of prompts in one launched op by
op behind it; both are one step to the worker. Whatever the host sends goes through pinned memory, and nothing waits for
the GPU but `read`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels.triton.decode_attention import GROUP_ROWS, DecodeScratch
from kernels.triton.decode_plan import DecodePlan, even_plan, fixed_plan
from kernels.triton.step_inputs import StepInputs, gather_inputs, set_entries
from models.batch import Draw, Drawn, Launched, Row
from models.config import ModelConfig
from models.cuda.attention import ChunkAttention, choose_attention
from models.cuda.chunks import TABLE_WIDTH, ChunkArrays, lay_out
from models.cuda.decoder import DeviceDecoder
from models.cuda.graphs import DecodeGraphs, Progress, lengths_up_to, no_progress, sizes_up_to
from models.cuda.products import TABLED_ROWS, Policy, fastest, invariant
from models.cuda.queue import Mark, Queue, Work
from models.cuda.sampling import SlotSampler
from models.cuda.slots import Slots
from models.cuda.upload import ALIGNED, Upload, aligned
from models.weights import Weights
from node.errors import InvariantBroken, SettingsError
from node.messages import SamplingParams

FAST_LENGTHS = (8192, 1 << 30)
"""First length and factor of the lengths that get graphs of their own: longer sequences want more programs a row."""
FIXED_LENGTHS = (2048, 4)
"""With fixed chunks a graph has a program for each chunk of its longest row, whether the row is so long or not."""
CHUNK_ARRAYS = len(ChunkArrays._fields)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one step may hold, and how it is computed."""

    max_rows: int
    max_tokens: int
    run_ahead: int = 1
    deterministic: bool = False
    """Results do not depend on what else is in the step, at a cost of up to a seventh of a step's time."""


class CudaRunner:
    """See the module's docstring. One thread makes all calls."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        queue: Queue,
        limits: Limits,
        max_len: int,
        policy: Policy | None = None,
    ) -> None:
        """max_len: no sequence gets longer. policy: of matrix products, by default that of the limits."""
        _refuse_what_no_kernel_does(config)
        self.config = config
        self.kv_dtype = weights.embedding.dtype
        self.run_ahead = limits.run_ahead
        self.queue, self._limits = queue, limits
        policy = policy or (invariant if limits.deterministic else fastest)
        rows = limits.max_rows
        self._decoder = DeviceDecoder(config, weights, policy, max(limits.max_tokens, rows), rows, max_len)
        self._sampler = SlotSampler(queue, rows, rows, config.vocab_size)
        self._drawn = torch.zeros(rows, dtype=torch.int32, device=queue.device)
        self._results = [queue.host_buffer(rows) for _ in range(limits.run_ahead + 1)]
        self._bound: _Bound | None = None
        self._longest = max_len

    def bind_pool(self, pool: torch.Tensor, max_model_len: int, on_progress: Progress = no_progress) -> None:
        """Steps use this pool from now on. It must be contiguous, and zeroed: masks hide numbers, not NaN."""
        config, device = self.config, self.queue.device
        shape = (pool.shape[0], config.num_layers, 2, pool.shape[3], config.num_kv_heads, config.head_dim)
        if tuple(pool.shape) != shape or pool.dtype != self.kv_dtype or not pool.is_contiguous():
            raise InvariantBroken(f"a pool of {pool.dtype} {list(pool.shape)}, expected {self.kv_dtype} {list(shape)}")
        block_tokens, rows = pool.shape[3], self._limits.max_rows
        self._longest = max_model_len
        if block_tokens & (block_tokens - 1):
            raise SettingsError(f"--block-tokens {block_tokens}: on a GPU it must be a power of two")
        width = aligned(-(-max_model_len // block_tokens), TABLE_WIDTH)
        header = 3 * aligned(rows)
        first = FIXED_LENGTHS if self._limits.deterministic else FAST_LENGTHS
        sizes, lengths = sizes_up_to(rows), lengths_up_to(max_model_len, *first)
        attention = choose_attention(config, pool, self.queue, self._limits.deterministic)
        items = (self._limits.max_tokens // attention.tile + rows) * config.num_heads
        self._decoder.bind_pool(pool)
        self._bound = _Bound(
            block_tokens=block_tokens,
            slots=Slots(rows, width, device),
            inputs=StepInputs.make(rows, width, device),
            upload=Upload(self.queue, header + 2 * aligned(rows * width)),
            attention=attention,
            chunk_upload=Upload(
                self.queue, 3 * self._limits.max_tokens + rows * (width + 5) + 3 * items + CHUNK_ARRAYS * ALIGNED
            ),
            scratch=self._scratch([(size, self._plan(size, length)) for size in sizes for length in lengths]),
            graphs=DecodeGraphs(self.queue, sizes, lengths, self._decode_body),
        )
        self._bound.upload.send((self._header([]),))  # captures run on padding alone
        self._bound.graphs.capture_all(on_progress)

    def warm_up(self) -> None:
        """Run parts of prompts of every size that has kernels of its own, so that no request waits for a compiler. The
        pool's first blocks are written; nobody must own them yet."""
        bound = self._bind()
        width = -(-self._longest // bound.block_tokens)
        draw = Draw(SamplingParams(max_tokens=1, temperature=0.0), (), 1, 0)
        for size in (*TABLED_ROWS, self._limits.max_tokens):
            length = min(size, self._longest - 1, self._limits.max_tokens)
            self.launch([Row([0] * length, 0, range(width), draw)]).read()

    def launch(self, rows: Sequence[Row]) -> Launched:
        """As models.batch.Runner says."""
        if not self._results:
            raise InvariantBroken(f"more than {self.run_ahead + 1} steps are launched and not read")
        decode = [index for index, row in enumerate(rows) if decodes(row)]
        chunks = [index for index, row in enumerate(rows) if not decodes(row)]
        drawing = decode + [index for index in chunks if rows[index].draw is not None]
        buffer = self._results.pop()
        self._begin(rows)
        if decode:
            self._launch_decode([rows[index] for index in decode], buffer[: len(decode)])
        if chunks:
            self._launch_chunks([rows[index] for index in chunks], buffer[len(decode) : len(drawing)])
        return _Step(self.queue.mark(), buffer, drawing, len(rows), self._results.append)

    def logits(self, rows: Sequence[Row]) -> torch.Tensor:
        """Of parts of prompts, [rows that draw, vocab], without drawing: for tests and measurements; waits."""
        found: list[torch.Tensor] = []
        self._launch_chunks(rows, None, found.append)
        self.queue.mark().wait()
        return found[0]

    # -- steps

    def _begin(self, rows: Sequence[Row]) -> None:
        """What slots must know of rows that bring their own tokens."""
        for row in rows:
            if row.token_ids and row.draw is not None:
                self._sampler.set_row(row.slot, row.draw)
        self._sampler.flush()

    def _launch_decode(self, rows: Sequence[Row], result: torch.Tensor) -> None:
        bound, count = self._bind(), len(rows)
        graph = bound.graphs.graph_for(count, max(row.start for row in rows) + 1)
        _, places, blocks = bound.upload.send((self._header(rows), *bound.slots.changes(rows)))
        drawn = self._drawn[:count]

        def work() -> None:
            set_entries(bound.slots.tables.view(-1), places, blocks)
            graph()
            result.copy_(drawn, non_blocking=True)

        self.queue.enqueue(work)

    def _header(self, rows: Sequence[Row]) -> np.ndarray:
        """int32 [3, max_rows rounded up]: slots, positions and given tokens of a decode step; the rest is padding."""
        count, header = len(rows), np.full((3, aligned(self._limits.max_rows)), -1, dtype=np.int32)
        header[0, :count] = [row.slot for row in rows]
        header[0, count:] = self._bind().slots.padding
        header[1, :count] = [row.start for row in rows]
        header[2, :count] = [row.token_ids[0] if row.token_ids else -1 for row in rows]
        return header

    def _decode_body(self, num_rows: int, max_tokens: int) -> Work:
        """The launches of a decode step, whose inputs lie where `upload` puts them."""
        bound = self._bind()
        header = bound.upload.there[: 3 * aligned(self._limits.max_rows)].view(3, -1)
        slots, positions, given = header[0, :num_rows], header[1, :num_rows], header[2, :num_rows]
        inputs, drawn = bound.inputs.first(num_rows), self._drawn[:num_rows]
        plan = self._plan(num_rows, max_tokens)

        def body() -> None:
            kept = bound.slots
            gather_inputs(slots, positions, given, kept.last, kept.tables, bound.block_tokens, inputs)
            logits = self._decoder.decode(inputs, plan, bound.scratch, self.queue.pdl)
            self._sampler.draw(logits, slots, inputs.lengths, drawn)
            set_entries(kept.last, slots, drawn)

        return body

    def _launch_chunks(
        self,
        rows: Sequence[Row],
        result: torch.Tensor | None,
        on_logits: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        """The rows' tokens, and draws into `result`, or their logits to on_logits."""
        bound = self._bind()
        arrays = lay_out(rows, bound.block_tokens, self.config.num_heads, bound.attention.tile)
        for row in rows:
            bound.slots.begin(row.slot)
        sent = bound.chunk_upload.send(arrays)
        tokens, positions, kv_slots, starts, lengths, tables, work_items, last, slots, new_positions = sent
        count = len(arrays.drawn_tokens)
        attend = bound.attention.over(tables.view(len(rows), -1), starts, lengths, work_items.view(-1, 3))

        def work() -> None:
            logits = self._decoder.prefill(tokens, positions, kv_slots, attend, last)
            if on_logits is not None:
                on_logits(logits)
            elif count and result is not None:
                drawn = self._drawn[:count]
                self._sampler.draw(logits, slots, new_positions, drawn)
                set_entries(bound.slots.last, slots, drawn)
                result.copy_(drawn, non_blocking=True)

        self.queue.enqueue(work)

    def _scratch(self, plans: Sequence[tuple[int, DecodePlan]]) -> DecodeScratch:
        """Room for any of the plans, each with its number of rows."""
        config, device = self.config, self.queue.device
        heads = max(size * plan.num_splits for size, plan in plans) * config.num_heads
        return DecodeScratch(
            parts=torch.zeros(heads * config.head_dim, dtype=torch.float32, device=device),
            softmax=torch.zeros(heads * 2, dtype=torch.float32, device=device),
            arrived=torch.zeros(self._limits.max_rows * config.num_kv_heads, dtype=torch.int32, device=device),
        )

    def _plan(self, num_rows: int, max_tokens: int) -> DecodePlan:
        make = fixed_plan if self._limits.deterministic else even_plan
        return make(num_rows, self.config.num_kv_heads, max_tokens, self.queue.num_sms)

    def _bind(self) -> _Bound:
        if self._bound is None:
            raise InvariantBroken("no pool is bound")
        return self._bound


@dataclass(frozen=True, slots=True)
class _Bound:
    """What depends on the pool: how many blocks a sequence may have, and how large its blocks are."""

    block_tokens: int
    slots: Slots
    inputs: StepInputs
    upload: Upload
    attention: ChunkAttention
    chunk_upload: Upload
    scratch: DecodeScratch
    graphs: DecodeGraphs


@dataclass(frozen=True, slots=True)
class _Step:
    """A step on its way; its result lies in `buffer` once the mark has passed."""

    mark: Mark
    buffer: torch.Tensor
    drawing: list[int]
    num_rows: int
    give_back: Callable[[torch.Tensor], None]

    def read(self) -> list[Drawn | None]:
        self.mark.wait()
        result: list[Drawn | None] = [None] * self.num_rows
        for index, token_id in zip(self.drawing, self.buffer[: len(self.drawing)].tolist(), strict=True):
            result[index] = Drawn(token_id, None)
        self.give_back(self.buffer)
        return result


def decodes(row: Row) -> bool:
    """Whether the row is one token that follows a drawn one; a part of a prompt, however short, is a chunk."""
    return row.num_new == 1 and row.draw is not None and row.draw.num_generated > 0


def _refuse_what_no_kernel_does(config: ModelConfig) -> None:
    if config.head_dim % 16 or config.head_dim > 256:
        raise SettingsError(f"head_dim {config.head_dim}: the GPU's attention needs a multiple of 16 up to 256")
    if config.group_size > GROUP_ROWS:
        raise SettingsError(f"{config.group_size} query heads share a key head; the GPU's attention takes {GROUP_ROWS}")
