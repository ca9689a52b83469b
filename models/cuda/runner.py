"""One model on one GPU: launches steps that run ahead of the host, and reads them later.

    runner = CudaRunner(config, weights, queue, limits, max_len)  # weights and activations have their place now
    runner.bind_pool(pool, max_model_len, on_progress)       # compiles and captures the decode steps
    launched = runner.launch(rows); ...; launched.read()     # see models.batch

Rows that continue what their slots drew last run in a captured decode step, parts of prompts in another launch: small
ones captured too, larger ones op by op. Where a step has both, and not few tokens of prompts, they are one pass over
the weights, launched op by op. Whatever the host sends goes through pinned memory, and nothing waits for the GPU but
`read`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch

from baton.kernels.triton.decode_attention import DecodeScratch
from baton.kernels.triton.decode_plan import FP8_AIM, DecodePlan, fixed_plan, queries_of, split_plan
from baton.kernels.triton.decode_work import share_out
from baton.kernels.triton.pool import PagedPool
from baton.kernels.triton.prompt_logprobs import PromptLogprobRows, prompt_logprobs
from baton.kernels.triton.step_inputs import StepInputs, gather_inputs, set_entries
from baton.models.adapters.slots import NO_SLOTS, AdapterSlots
from baton.models.batch import DeviceTime, Draw, Launched, PromptTargets, Row
from baton.models.config import ModelConfig
from baton.models.cuda.adapter_bank import BankLayout, BankSlots
from baton.models.cuda.adapter_steps import NONE, AdapterSteps, adapter_of, rows_of
from baton.models.cuda.attention import ChunkAttention, choose_attention
from baton.models.cuda.chunks import TABLE_WIDTH, ChunkArrays, ChunkShape, behind, decodes, lay_out
from baton.models.cuda.decoder import DeviceDecoder
from baton.models.cuda.draft_budget import BudgetChoice, DraftBudget
from baton.models.cuda.drafts import DraftSlots
from baton.models.cuda.eagle import DeviceEagle
from baton.models.cuda.graphs import DecodeGraphs, lengths_up_to, sizes_up_to
from baton.models.cuda.latent import LatentContext, plan_latent_rows
from baton.models.cuda.launched import LaunchedStep, StepMarks, StepResult
from baton.models.cuda.limits import StepLimits, check_supported
from baton.models.cuda.peers import DevicePeers
from baton.models.cuda.pool_binding import CapturedChunks, PoolBinding
from baton.models.cuda.products import TABLED_ROWS, Policy, fastest, invariant
from baton.models.cuda.prompt_scores import pieces_of, scored_parts, targets_of
from baton.models.cuda.queue import ALIGNED, Draws, Queue, QueueMark, Upload, Work, aligned
from baton.models.cuda.slots import Slots, SlotSampler
from baton.models.cuda.step_decoder import StepDecoder
from baton.models.eagle_config import EagleConfig
from baton.models.eagle_weights import EagleWeights
from baton.models.kv_format import KvFormat
from baton.models.layer_order import no_tap
from baton.models.layer_weights import Weights
from baton.models.partition import WHOLE, part_of
from baton.models.sampling_rules import EVERYTHING
from baton.models.weights import Progress, no_progress
from baton.node.errors import InvariantBroken, SettingsError
from baton.node.messages.control import SamplingSpec

FIXED_LENGTHS = (2048, 4)
"""First length and factor of the lengths that get graphs of their own where chunks are fixed: there a graph has a
program for each chunk of its longest row, whether the row is so long or not."""
PDL_ROWS = 128
"""With more rows, kernels that start early take more than they give."""
CHUNK_SIZES, CHUNK_SEQUENCES = ((128, 1), (256, 1), (512, 1), (1024, 900)), 4
"""Parts of prompts of up to so many tokens, of up to so many sequences, are captured as well, and run so from the
second number of tokens on: with fewer the rest, which is computed too, takes longer than launching does."""
CHUNK_ARRAYS = len(ChunkArrays._fields) + 1
WIDENED_BYTES, WIDENED_TOKENS = 512 << 20, 2048
"""For the context of the chunks of a step in one layer, where KV is quantised: 131,072 tokens of an 8B model. No more
than all rows' longest sequences, rounded up to as many tokens as tables are wide."""
TIMED_STEPS = 4
SCORED_ROWS = 128
"""Rows of logits at a time where a prompt's log probabilities are asked for."""


class CudaRunner:
    """Launches steps of one model over one pool. One thread makes all calls."""

    def __init__(
        self,
        config: ModelConfig,
        model: Weights | StepDecoder,
        queue: Queue,
        limits: StepLimits,
        max_len: int,
        policy: Policy | None = None,
        kv_format: KvFormat | None = None,
        peers: DevicePeers | None = None,
        eagle: tuple[EagleConfig, EagleWeights] | None = None,
    ) -> None:
        """model: weights that run by the kernels here, or what computes steps in another way, with room for the limits.
        max_len: no sequence gets longer. policy: of matrix products, by default that of the limits. kv_format: by
        default keys and values are of the weights' dtype. peers: the weights are one rank's part; all ranks launch the
        same steps, and draw the same tokens. eagle: a draft, whose layer lies behind the model's in the pool; it
        proposes in place of the search for matches."""
        own = part_of(config, WHOLE if peers is None else peers.rank)
        check_supported(own)
        if peers is not None and (limits.most_drafts or eagle is not None):
            raise SettingsError("--speculate: on a GPU no drafts are verified by more than one rank")
        self.config, self._own, self._peers = config, own, peers
        self.run_ahead = limits.run_ahead
        self.queue, self._limits = queue, limits
        policy = policy or (invariant if limits.deterministic else fastest)
        rows, row_tokens = limits.max_rows, limits.decode_tokens
        self._most_tokens = max(limits.max_tokens, row_tokens)
        self._eagle: DeviceEagle | None = None
        if eagle is not None:
            self._eagle = DeviceEagle(*eagle, config.num_layers, self._most_tokens, row_tokens, max_len)
            self._following = Upload(queue, self._most_tokens + ALIGNED)
        self.adapters: AdapterSlots = NO_SLOTS
        self._adapters: AdapterSteps | None = None
        if limits.adapter_slots:
            if peers is not None:
                raise SettingsError("--max-loras: ranks of a tensor parallel worker take no adapters on GPUs")
            self._adapters = self._make_adapters(model, limits)
        self._decoder: StepDecoder = (
            DeviceDecoder(
                own,
                model,
                policy,
                self._most_tokens,
                row_tokens,
                max_len,
                None if peers is None else peers.sums,
                self._adapters,
                no_tap if self._eagle is None else self._eagle.tap,
            )
            if isinstance(model, Weights)
            else model
        )
        dtype = self._decoder.dtype
        self.kv_format = kv_format or KvFormat.plain(dtype)
        self.kv_dtype = self.kv_format.dtype
        self.drafts: DraftSlots | None = None
        if limits.most_drafts:
            self.drafts = DraftSlots(queue, rows, row_tokens, limits.most_drafts, max_len)
        kept = None if self.drafts is None else self.drafts.kept
        self._sampler = SlotSampler(queue, rows, row_tokens, config.vocab_size, peers, kept)
        if self.drafts is not None:
            self.drafts.counted = self._sampler.tables
        if peers is not None:
            peers.reserve(row_tokens, dtype)
        self.budget = DraftBudget(sizes_up_to(row_tokens), limits.most_drafts, by_model=eagle is not None)
        self._widened = None  # with the weights and activations, since the pool is planned from what these leave
        if self.kv_format.quantised and not limits.deterministic:
            token_elements = 2 * own.num_kv_heads * config.head_dim
            most = WIDENED_BYTES // dtype.itemsize // token_elements
            tokens = min(most, rows * aligned(max_len, WIDENED_TOKENS))
            self._widened = torch.zeros(tokens * token_elements, dtype=dtype, device=queue.device)
        self._sinks = model.sinks if isinstance(model, Weights) else (None,) * config.num_layers
        self._latents: LatentContext | None = None
        if config.latent is not None:
            assert isinstance(model, Weights), "no other code runs latent attention"
            self._latents = LatentContext(
                model, self._most_tokens, rows * aligned(max_len, WIDENED_TOKENS), queue.num_sms
            )
        scored_rows = min(SCORED_ROWS, row_tokens)  # their logits lie where those of rows that draw do
        self._found = PromptLogprobRows.make(self._most_tokens, scored_rows, config.vocab_size, queue.device)
        self._drawn = torch.zeros(row_tokens, dtype=torch.int32, device=queue.device)
        drafted = row_tokens if limits.most_drafts else 0
        self._results = [StepResult(queue, rows, limits.most_drafts, drafted) for _ in range(limits.run_ahead + 1)]
        self._last: QueueMark | None = None
        self._bound: PoolBinding | None = None
        self._longest = max_len

    def _make_adapters(self, model: Weights | StepDecoder, limits: StepLimits) -> AdapterSteps:
        """With memory for the slots, which become `adapters`."""
        if not isinstance(model, Weights):
            raise SettingsError(f"--max-loras: {self.config.architecture} runs through transformers, without adapters")
        layout = BankLayout.of(self.config)
        dtype = model.embedding.dtype
        self.adapters = slots = BankSlots(layout, limits.adapter_slots, limits.max_rank, dtype, self.queue.beside())
        return AdapterSteps(
            self.queue,
            slots,
            layout,
            limits.max_rows,
            limits.decode_tokens,
            self._most_tokens,
            deterministic=limits.deterministic,
        )

    def bind_pool(
        self,
        pool: torch.Tensor,
        max_model_len: int,
        on_progress: Progress = no_progress,
        scales: torch.Tensor | None = None,
    ) -> None:
        """Steps use this pool from now on, as kernels.triton.pool describes it. It must be zeroed: masks hide numbers,
        not NaN. scales: in the pool's memory, where each key and value has its own."""
        config, device = self._own, self.queue.device
        units = (config.num_kv_heads, config.num_layers + (self._eagle is not None))
        planes = (config.kv_planes, pool.shape[4], config.head_dim)
        shape = (pool.shape[0], *units, *planes)
        if tuple(pool.shape) != shape or pool.dtype != self.kv_dtype:
            raise InvariantBroken(f"a pool of {pool.dtype} {list(pool.shape)}, expected {self.kv_dtype} {list(shape)}")
        if (scales is not None) != self.kv_format.has_scales_inside:
            raise InvariantBroken("a pool has scales if, and only if, they are made when KV is written")
        static = self.kv_format.static
        if static is not None and self._peers is not None:
            heads = self._peers.rank.key_heads(self.config.num_kv_heads)
            static = static[..., heads.start : heads.stop].contiguous()
        paged = PagedPool.of(pool, scales if static is None else static.to(device), config.kv_planes)
        block_tokens, rows, row_tokens = pool.shape[4], self._limits.max_rows, self._limits.decode_tokens
        self._longest = max_model_len
        if block_tokens & (block_tokens - 1):
            raise SettingsError(f"--block-tokens {block_tokens}: on a GPU it must be a power of two")
        width = aligned(-(-max_model_len // block_tokens), TABLE_WIDTH)
        header = 3 * aligned(rows)
        sizes, all_lengths = sizes_up_to(row_tokens), lengths_up_to(max_model_len, *FIXED_LENGTHS)
        lengths = all_lengths if self._limits.deterministic else all_lengths[-1:]
        attention: ChunkAttention
        if self._latents is not None:
            attention = self._latents.over_pool(paged)
        else:
            fixed = self._limits.deterministic
            attention = choose_attention(config, self._sinks, paged, self.queue, fixed, self._widened)
        tokens = self._most_tokens
        items = (tokens // attention.tile + rows) * config.num_heads
        self._decoder.bind_pool(paged)
        row_sizes = sizes_up_to(rows)
        if self._eagle is not None:
            self._eagle.bind_pool(paged, width, max(self._rows_plan(size).num_chunks for size in sizes))
        self._bound = PoolBinding(
            block_tokens=block_tokens,
            slots=Slots(rows, width, device),
            inputs=StepInputs.make(row_tokens, width, device),
            upload=Upload(self.queue, header + 2 * aligned(rows * width)),
            attention=attention,
            chunk_upload=Upload(
                self.queue,
                4 * tokens + rows * (width + 5) + 3 * items + CHUNK_ARRAYS * ALIGNED + self._adapter_numbers(tokens),
            ),
            scratch=DecodeScratch.make(
                row_tokens,
                max(self._plan(size, length).num_parts for size in sizes for length in lengths),
                config.num_heads,
                config.num_kv_heads,
                config.head_dim if config.latent is None else config.latent.latent_dim,
                device,
            ),
            graphs=DecodeGraphs(self._capture_step, sizes, lengths, self._decode_body),
            adapted=DecodeGraphs(self._capture_step, sizes, lengths, partial(self._decode_body, adapted=True)),
            edited=DecodeGraphs(self.queue.capture, sizes, (max_model_len,), self._edited_body),
            accepted=DecodeGraphs(self.queue.capture, sizes, (max_model_len,), self._accepted_body),
            proposed=DecodeGraphs(self.queue.capture, row_sizes, (max_model_len,), self._proposed_body),
            both=torch.zeros(3, self._most_tokens, dtype=torch.int32, device=device),
            chunk_steps=[],
            adapted_chunk_steps=[],
        )
        self.queue.rehearse(self._rehearse)
        self._capture(self._bound, on_progress)

    def warm_up(self) -> None:
        """Run parts of prompts of every size that has kernels of its own, so that no request waits for a compiler. The
        pool's first blocks are written: no sequence may own them yet."""
        bound = self._bind()
        width = -(-self._longest // bound.block_tokens)
        draw = Draw(SamplingSpec(max_tokens=1, temperature=0.0), (), 1, 0)
        edited = Draw(EVERYTHING, (0, 0), 1, 1)
        self.launch([Row([0], 1, range(width), edited)]).read()
        for size in TABLED_ROWS:
            self.launch([Row([0], 0, [0], draw, slot) for slot in range(min(size, self._limits.max_rows))]).read()
        length = min(self._longest - 1, self._limits.max_tokens)
        self.launch([Row([0] * length, 0, range(width), draw)]).read()
        if self._adapters is not None:
            self._warm_up_adapters(range(width), draw, length)
        if length > 1:
            targets = PromptTargets(0, [0] * (length - 1), 1)
            self.launch([Row([0] * length, 0, range(width), draw, 0, targets)]).read()
        if self.drafts is not None:
            self._time_steps(bound)

    def _warm_up_adapters(self, blocks: range, draw: Draw, length: int) -> None:
        """As `warm_up`; a slot that was never filled adds nothing."""
        for size in TABLED_ROWS:
            rows = range(min(size, self._limits.max_rows))
            self.launch([Row([0], 0, [0], draw, slot, adapter=0) for slot in rows]).read()
        self.launch([Row([0] * length, 0, blocks, draw, adapter=0)]).read()

    def launch(self, rows: Sequence[Row]) -> Launched:
        """As models.batch.Runner says."""
        if not self._results:
            raise InvariantBroken(f"more than {self.run_ahead + 1} steps are launched and not read")
        decode = [index for index, row in enumerate(rows) if decodes(row)]
        chunks = [index for index, row in enumerate(rows) if not decodes(row)]
        drawing = decode + [index for index in chunks if rows[index].draw is not None]
        masked = [row.slot for row in rows if row.draw is not None and row.draw.is_masked]
        draws = Draws(self.queue, deferred=bool(masked))
        result = self._results.pop()
        self._begin(rows, searches=not masked)
        own, parts = [rows[index] for index in decode], [rows[index] for index in chunks]
        choice = self._choose(own, parts, masked=bool(masked))
        begun = self._launch_both(own, parts, result, draws, choice)
        num_tops = [self._sampler.num_top(rows[index].slot) for index in drawing]
        before = self._last or begun
        computed = self.queue.mark() if masked else None
        scored = scored_parts(rows, chunks)

        def end(masks: np.ndarray | None) -> StepMarks:
            came = None
            if masks is not None:
                came = self.queue.mark()
                self._sampler.set_masks(masked, masks)
                draws.enqueue()
            if self._peers is not None:
                self.queue.enqueue(self._peers.bring)
            self._last = self.queue.mark()
            return StepMarks(before, begun, self._last, computed, came)

        marks = None if masked else end(None)
        learn = None if choice is None else partial(self._learn, choice, alone=not chunks)
        check = None if self._peers is None else self._peers.check
        return LaunchedStep(
            marks, result, drawing, num_tops, len(rows), self._results.append, end, scored, learn, check
        )

    @property
    def score_bytes(self) -> int:
        """Memory of the device that log probabilities of prompts take, whether any are asked for or not."""
        return self._found.size_bytes

    def logits(self, rows: Sequence[Row]) -> torch.Tensor:
        """Of parts of prompts, [rows that draw, vocab], valid until the next step: for tests; waits."""
        result = self._results[-1]
        self._launch_chunks(rows, result, 0, Draws(self.queue, deferred=False))
        count, found = sum(row.draw is not None for row in rows), list[torch.Tensor]()
        self.queue.enqueue(lambda: found.append(self._whole(self._decoder.last_logits(count))))
        self.queue.mark().wait()
        return found[0]

    def _whole(self, logits: torch.Tensor) -> torch.Tensor:
        """Of all tokens, [rows, vocab]; where ranks share them all ranks call this."""
        return logits if self._peers is None else self._peers.whole(logits)

    # -- steps

    def _begin(self, rows: Sequence[Row], *, searches: bool) -> None:
        """What slots must know of rows that bring their own tokens; searches: for drafts behind them."""
        for row in rows:
            if row.token_ids and row.draw is not None:
                self._sampler.set_row(row.slot, row.draw)
                if self.drafts is not None:
                    self.drafts.begin(row, self._longest, searches=searches)
                    self.budget.begin(row.slot)
        self._sampler.flush()
        if self.drafts is not None:
            self.drafts.flush()

    def _choose(self, decode: Sequence[Row], chunks: Sequence[Row], *, masked: bool) -> BudgetChoice | None:
        """The tokens of the decode rows, drafts included; None: no more than there are rows."""
        if self.drafts is None or not decode or masked or self._is_mixed(decode, chunks):
            return None
        return self.budget.choose((row.slot, row.most_drafts) for row in decode)

    def _learn(self, choice: BudgetChoice, result: StepResult, took: DeviceTime, *, alone: bool) -> None:
        """alone: the step had no part of a prompt."""
        self.budget.read(choice, result.drafts(len(choice.slots)), took.busy_s if alone else None)

    def _is_mixed(self, decode: Sequence[Row], chunks: Sequence[Row]) -> bool:
        """Whether they are one pass."""
        new = sum(row.num_new for row in chunks)
        scores = any(row.targets is not None for row in chunks)
        fits = bool(decode) and self._bind().graphs.size_for(len(decode)) + new <= self._most_tokens
        return fits and not scores and new >= self._limits.mixed_tokens

    def _launch_both(
        self,
        decode: Sequence[Row],
        chunks: Sequence[Row],
        result: StepResult,
        draws: Draws,
        choice: BudgetChoice | None,
    ) -> QueueMark:
        """Of either kind there may be none. Returns the step's begin on the device."""
        if self._is_mixed(decode, chunks):
            result.place_chunks(0, 0)
            return self._launch_mixed(decode, chunks, result, self._bind().graphs.size_for(len(decode)), draws)
        begun = []
        result.place_chunks(len(decode), len(decode) if choice is None else choice.tokens)
        if decode:
            keep_logits = draws.deferred and bool(chunks)
            begun.append(self._launch_decode(decode, result, draws, choice, keep_logits=keep_logits))
        if chunks:
            begun.append(self._launch_chunks(chunks, result, len(decode), draws))
        return begun[0]

    def _launch_decode(
        self,
        rows: Sequence[Row],
        result: StepResult,
        draws: Draws,
        choice: BudgetChoice | None,
        *,
        keep_logits: bool,
    ) -> QueueMark:
        """Returns its begin on the device. `keep_logits`: another launch writes its own before these rows draw."""
        bound, count = self._bind(), len(rows)
        num_tokens = count if choice is None else choice.tokens
        graphs = bound.graphs
        if self._update_adapters(rows):
            graphs = bound.adapted
        graph = graphs.graph_for(num_tokens, self._longest_of(rows))
        sent = (self._header(rows, drafting=choice is not None), *bound.slots.changes(rows))
        header, places, blocks = bound.upload.send(sent)
        edits = any(self._sampler.edits(row.slot) for row in rows)
        edited = bound.edited.graph_for(num_tokens, 1) if edits else None
        accepted = bound.accepted.graph_for(num_tokens, 1) if self.drafts is not None else None
        slots = header[:count] if choice is None or self.drafts is None else self.drafts.slots[:num_tokens]
        finish = self._finish(rows, slots, result, 0, 0)
        proposed = None
        if self._eagle is not None and self.drafts is not None and choice is not None and choice.proposes:
            proposed = bound.proposed.graph_for(count, 1)
        kept: list[torch.Tensor] = []

        def forward() -> None:
            set_entries(bound.slots.tables.view(-1), places, blocks)
            graph()
            if keep_logits:
                kept.append(self._decoder.last_logits(count).clone())

        def choose() -> None:
            if kept:
                self._draw(kept[0], header[:count], bound.inputs.lengths[:count], edited=True)
            elif edited is not None:  # the graph drew as if a temperature were all
                edited()
            if kept and self.drafts is not None and self._eagle is not None:  # hidden states are no longer there
                self._take_in(self._slots_of(count), first_without=count)
            elif accepted is not None:
                accepted()
            if proposed is not None:
                proposed()
            finish(kept[0] if kept else self._decoder.last_logits(num_tokens))

        begun = self.queue.mark()
        draws.launch(forward, choose)
        return begun

    def _longest_of(self, rows: Sequence[Row]) -> int:
        """Tokens of the longest of rows that decode; with drafts in flight, those that its blocks have room for."""
        if self.drafts is None:
            return max(row.start for row in rows) + 1
        return min(self._longest, max(len(row.blocks) for row in rows) * self._bind().block_tokens)

    def _header(self, rows: Sequence[Row], *, drafting: bool = False) -> np.ndarray:
        """int32 [3, max_rows rounded up]: slots, positions and given tokens of a decode step; the rest is padding. In
        the place of positions, of a runner with drafts: how many each row may have; behind, for how many tokens its
        blocks have room."""
        count, header = len(rows), np.full((3, aligned(self._limits.max_rows)), -1, dtype=np.int32)
        header[0, :count] = [row.slot for row in rows]
        header[0, count:] = self._bind().slots.padding
        if self.drafts is not None:
            header[1, :count] = [row.most_drafts if drafting else 0 for row in rows]
            if self._eagle is not None:
                header[2, :count] = [len(row.blocks) * self._bind().block_tokens for row in rows]
            return header
        header[1, :count] = [row.start for row in rows]
        header[2, :count] = [row.token_ids[0] if row.token_ids else -1 for row in rows]
        return header

    def _update_adapters(self, rows: Sequence[Row]) -> bool:
        """Whether any of these rows that decode has an adapter; then the device gets to know which have which."""
        has_any = any(row.adapter is not None for row in rows)
        if has_any:
            assert self._adapters is not None, "a row with an adapter, and no slots"
            self._adapters.update(rows)
        return has_any

    def _lay_out_adapters(self, rows: Sequence[Row], padded: int, num_tokens: int, before: int = 0) -> list[np.ndarray]:
        """Arrays of the adapters of a step, none if no row has one: of `before` rows of one token, which are padded to
        `padded` tokens, and of parts of prompts behind them, padded to num_tokens in all."""
        if all(row.adapter is None for row in rows):
            return []
        assert self._adapters is not None, "a row with an adapter, and no slots"
        adapters, counts = [adapter_of(row) for row in rows], [row.num_new for row in rows]
        adapters[before:before], counts[before:before] = [NONE], [padded - before]
        behind_them = num_tokens - sum(counts)
        return list(self._adapters.lay_out([*adapters, NONE], [*counts, behind_them]))

    def _adapter_numbers(self, num_tokens: int) -> int:
        """Room for them in an upload."""
        return 0 if self._adapters is None else self._adapters.capacity(num_tokens) + 4 * ALIGNED

    def _decode_body(self, num_rows: int, max_tokens: int, *, adapted: bool = False) -> Work:
        """The launches of a decode step, whose inputs lie where `upload` puts them."""
        bound, inputs, pdl = self._bind(), self._bind().inputs.first(num_rows), self._pdl(num_rows)
        slots, plan = self._slots_of(num_rows), self._plan(num_rows, max_tokens)

        def body() -> None:
            self._gather(inputs, plan)
            adapters = None
            if adapted:
                assert self._adapters is not None, "steps with adapters, and no slots"
                adapters = self._adapters.group(slots)
            logits = self._decoder.decode(inputs, plan, bound.scratch, pdl, adapters)
            self._draw(logits, slots, inputs.lengths, edited=False)

        return body

    def _gather(self, inputs: StepInputs, plan: DecodePlan) -> None:
        """What the rows of a decode step compute, from the header that was sent and what their slots keep, and how
        attention shares it out."""
        bound, num_rows = self._bind(), len(inputs.tokens)
        header = bound.upload.there[: 3 * aligned(self._limits.max_rows)].view(3, -1)
        if self.drafts is not None:
            self.drafts.gather(header[0], header[1], bound.slots.tables, bound.block_tokens, inputs, plan.queries)
            self.drafts.share_out(inputs.lengths, plan, bound.scratch.work)
        else:
            slots, positions, given = header[0, :num_rows], header[1, :num_rows], header[2, :num_rows]
            gather_inputs(slots, positions, given, bound.slots.last, bound.slots.tables, bound.block_tokens, inputs)
            share_out(inputs.lengths, plan, bound.scratch.work)

    def _slots_of(self, num_tokens: int) -> torch.Tensor:
        """The slots of a decode step's tokens, on the device."""
        return self._bind().upload.there[:num_tokens] if self.drafts is None else self.drafts.slots[:num_tokens]

    def _pdl(self, num_rows: int) -> bool:
        return self.queue.pdl and num_rows <= PDL_ROWS

    def _edited_body(self, num_rows: int, max_tokens: int) -> Work:
        """Draws anew, with every parameter, what a decode step of any length drew."""
        bound = self._bind()
        slots, positions = self._slots_of(num_rows), bound.inputs.lengths[:num_rows]
        logits = self._decoder.last_logits(num_rows)
        return partial(self._draw, logits, slots, positions, edited=True)

    def _accepted_body(self, num_rows: int, max_tokens: int) -> Work:
        """Takes in what a decode step of any length drew."""
        drafts, eagle, bound = self.drafts, self._eagle, self._bind()
        assert drafts is not None, "a runner without drafts"
        drawn, slots, inputs = self._drawn[:num_rows], self._slots_of(num_rows), bound.inputs.first(num_rows)
        if eagle is None:
            return partial(drafts.take_in, drawn, slots)

        def body() -> None:
            drafts.accept(drawn, slots)
            eagle.write(drawn, inputs.positions, inputs.kv_slots)
            eagle.forget(slots, drafts, bound.slots.tables, bound.block_tokens)

        return body

    def _proposed_body(self, num_rows: int, max_tokens: int) -> Work:
        """Proposes drafts by a model, behind a decode step of any length that was taken in."""
        drafts, eagle, bound = self.drafts, self._eagle, self._bind()
        assert drafts is not None and eagle is not None, "a runner without a draft"
        header = bound.upload.there[: 3 * aligned(self._limits.max_rows)].view(3, -1)
        slots, covered, plan = header[0, :num_rows], header[2, :num_rows], self._rows_plan(num_rows)
        draw, tables = self._sampler.draw, bound.slots.tables
        return partial(eagle.propose, slots, covered, drafts, tables, bound.block_tokens, plan, draw)

    def _rows_plan(self, num_rows: int) -> DecodePlan:
        """Of the attention of a draft, whose sums no token depends on."""
        aim = FP8_AIM if self.kv_format.quantised else 1
        return split_plan(num_rows, self.config.num_kv_heads, self.queue.num_sms, aim)

    def _draw(self, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, edited: bool) -> None:
        """The next token of each row, kept for its slot; `edited`: with every parameter, else a temperature alone."""
        drawn = self._drawn[: len(slots)]
        if edited:
            self._sampler.draw_edited(self._whole(logits), slots, positions, drawn)
        else:
            self._sampler.draw(logits, slots, positions, drawn)
        if self.drafts is None:
            set_entries(self._bind().slots.last, slots, drawn)

    def _finish(
        self, rows: Sequence[Row], slots: torch.Tensor, result: StepResult, first: int, place: int
    ) -> Callable[[torch.Tensor], None]:
        """What brings tokens that were drawn for these rows, from logits of the tokens of these slots, [tokens, V], to
        the rows of the result from `first` on, and log probabilities to its places from `place` on."""
        drawn = self._drawn[: len(slots)]
        wanted = any(self._sampler.num_top(row.slot) is not None for row in rows)

        def finish(logits: torch.Tensor) -> None:
            if self.drafts is None:
                result.take_tokens(first, drawn)
            else:
                result.take_accepted(first, self.drafts.results[: len(rows)])
            if wanted:
                self._sampler.logprobs(self._whole(logits), slots, drawn)
                result.take_logprobs(place, len(slots), self._sampler.found)

        return finish

    def _launch_chunks(self, rows: Sequence[Row], result: StepResult, first: int, draws: Draws) -> QueueMark:
        """Computes parts of prompts, and draws what they ask for to the places of `result` from `first` on. Returns its
        begin on the device."""
        bound = self._bind()
        arrays = lay_out(rows, bound.block_tokens, self._own.num_heads, bound.attention.tile)
        for row in rows:
            bound.slots.begin(row.slot)
        has_adapters = any(row.adapter is not None for row in rows)
        if any(row.targets is not None for row in rows):
            adapters = self._lay_out_adapters(rows, 0, len(arrays.tokens))
            targets, *sent = bound.chunk_upload.send((targets_of(rows), *arrays, *adapters))
            prefill = self._scored_body(rows, sent, targets, result)
        else:
            steps = bound.adapted_chunk_steps if has_adapters else bound.chunk_steps
            captured = next((step for step in steps if step.shape.holds(arrays)), None)
            if captured is not None:
                arrays = captured.shape.padded(arrays, bound.slots.padding)
            adapters = self._lay_out_adapters(rows, 0, len(arrays.tokens))
            sent = bound.chunk_upload.send((*arrays, *adapters))
            prefill = self._prefill_body(sent) if captured is None else captured.launch
        drawing = [row for row in rows if row.draw is not None]
        slots, new_positions = (array[: len(drawing)] for array in sent[len(arrays) - 2 : len(arrays)])
        edited = any(self._sampler.edits(row.slot) for row in drawing)
        finish = self._finish(drawing, slots, result, first, result.chunk_places)
        num_tokens = sum(row.num_new for row in rows)
        write = self._prompt_entries(rows, 0, sent[1][:num_tokens], sent[2][:num_tokens], sent[7][: len(drawing)])

        def forward() -> None:
            prefill()
            if draws.deferred:
                write(drawn=False)

        def choose() -> None:
            if drawing:
                logits = self._decoder.last_logits(len(drawing))
                self._draw(logits, slots, new_positions, edited)
                self._take_in(slots, first_without=0)
            elif self._peers is not None:
                self._peers.meet()  # what other ranks write of the chunks is complete when this step is
            if not draws.deferred:
                write(drawn=True)
            if drawing:
                finish(self._decoder.last_logits(len(drawing)))

        begun = self.queue.mark()
        draws.launch(forward, choose)
        return begun

    def _take_in(self, slots: torch.Tensor, *, first_without: int) -> None:
        """What was drawn in a step with parts of prompts, for rows of these slots."""
        if self.drafts is None:
            return
        drawn, bound = self._drawn[: len(slots)], self._bind()
        if self._eagle is None:
            self.drafts.take_in(drawn, slots, first_without=first_without)
        else:
            self.drafts.accept(drawn, slots, first_without=first_without)
            self._eagle.forget(slots, self.drafts, bound.slots.tables, bound.block_tokens)

    def _prompt_entries(
        self, rows: Sequence[Row], padded: int, positions: torch.Tensor, kv_slots: torch.Tensor, last: torch.Tensor
    ) -> Callable[..., None]:
        """Writes the entries of a draft, if there is one, for a step of parts of prompts behind `padded` other tokens;
        `last`: of each row that draws, the token that its draw follows. Where masks come later, before the draw: blocks
        may be read from then on, and the last entry is of a token that is not known."""
        eagle = self._eagle
        if eagle is None:
            return lambda drawn: None
        known = np.zeros(aligned(padded + sum(row.num_new for row in rows)), dtype=np.int32)
        at = padded
        for row in rows:
            known[at : at + row.num_new - 1] = row.token_ids[1:]
            known[at + row.num_new - 1] = row.token_ids[-1] if row.following is None else row.following
            at += row.num_new
        (sent,) = self._following.send((known,))
        tokens = sent[: len(positions)]

        def write(drawn: bool) -> None:
            if drawn and len(last):
                set_entries(tokens, last, self._drawn[: len(last)])
            eagle.write(tokens, positions, kv_slots)

        return write

    def _launch_mixed(
        self, decode: Sequence[Row], chunks: Sequence[Row], result: StepResult, padded: int, draws: Draws
    ) -> QueueMark:
        """One pass for rows that decode, padded as in their graph, and parts of prompts behind them."""
        bound = self._bind()
        longest = bound.graphs.length_for(self._longest_of(decode))
        _, places, blocks = bound.upload.send((self._header(decode), *bound.slots.changes(decode)))
        arrays = lay_out(chunks, bound.block_tokens, self._own.num_heads, bound.attention.tile)
        for row in chunks:
            bound.slots.begin(row.slot)
        of_adapters = self._lay_out_adapters(
            [*decode, *chunks], padded, padded + len(arrays.tokens), before=len(decode)
        )
        sent = bound.chunk_upload.send((*behind(arrays, decode, padded), *of_adapters))
        tokens, positions, kv_slots, starts, lengths, tables, items, last, slots, new_positions, *with_adapters = sent
        adapters = rows_of(with_adapters) if with_adapters else None
        inputs = bound.inputs.first(padded)
        plan, pdl = self._plan(padded, longest), self._pdl(padded)
        of_rows = self._decoder.attend_rows(inputs, plan, bound.scratch, pdl)
        of_chunks = bound.attention.over(tables.view(len(lengths), -1), starts, lengths, items.view(-1, 3))
        drawing = [*decode, *(row for row in chunks if row.draw is not None)]
        edited = any(self._sampler.edits(row.slot) for row in drawing)
        finish = self._finish(drawing, slots, result, 0, 0)
        both = bound.both[:, : padded + len(tokens)]
        write = self._prompt_entries(chunks, padded, both[1], both[2], last)

        def attend(layer: int, query: torch.Tensor, out: torch.Tensor) -> None:
            of_rows(layer, query[:padded], out[:padded])
            of_chunks(layer, query[padded:], out[padded:])

        def forward() -> None:
            set_entries(bound.slots.tables.view(-1), places, blocks)
            self._gather(inputs, plan)
            if self.drafts is not None:
                new_positions[: len(decode)].copy_(inputs.lengths[: len(decode)])
            pairs = (inputs.tokens, tokens), (inputs.positions, positions), (inputs.kv_slots, kv_slots)
            for pair, joined in zip(pairs, both, strict=True):
                torch.cat(pair, out=joined)
            self._decoder.prefill(both[0], both[1], both[2], attend, last, adapters)
            if draws.deferred:
                write(drawn=False)

        def choose() -> None:
            logits = self._decoder.last_logits(len(drawing))
            self._draw(logits, slots, new_positions, edited)
            self._take_in(slots, first_without=len(decode))
            if not draws.deferred:
                write(drawn=True)
            finish(logits)

        begun = self.queue.mark()
        draws.launch(forward, choose)
        return begun

    def _prefill_body(self, sent: Sequence[torch.Tensor]) -> Work:
        """The launches of parts of prompts over a step's arrays on the device, in the order of ChunkArrays; behind them
        may be those of adapters."""
        tokens, positions, kv_slots, starts, lengths, tables, items, last, _, _, *with_adapters = sent
        adapters = rows_of(with_adapters) if with_adapters else None
        attention = self._bind().attention
        attend = attention.over(tables.view(len(lengths), -1), starts, lengths, items.view(-1, 3))
        return partial(self._decoder.prefill, tokens, positions, kv_slots, attend, last, adapters)

    def _scored_body(
        self, rows: Sequence[Row], sent: Sequence[torch.Tensor], targets: torch.Tensor, result: StepResult
    ) -> Work:
        """The same, with log probabilities of the rows' targets: a few rows of logits at a time."""
        tokens, positions, kv_slots, starts, lengths, tables, items, last, _, _, *with_adapters = sent
        adapters = rows_of(with_adapters) if with_adapters else None
        attention = self._bind().attention
        pieces = pieces_of(rows, len(self._found.sums), self.config.vocab_size)

        def take(logits: torch.Tensor, number: int) -> None:
            piece = pieces[number]
            prompt_logprobs(self._whole(logits), targets, piece.place, piece.num_top, self._found)

        def work() -> None:
            attend = attention.over(tables.view(len(lengths), -1), starts, lengths, items.view(-1, 3))
            spans = [piece.tokens for piece in pieces]
            self._decoder.prefill_scored(tokens, positions, kv_slots, attend, last, spans, take, adapters)
            result.take_scores(len(targets), self._found)

        return work

    def _rehearse(self) -> None:
        """All that is launched before the first request, whatever part of it a GPU is wanted for."""
        results = list(self._results)
        try:
            with self._decoder.abridged():
                self._capture(self._bind(), no_progress)
                self.warm_up()
        finally:
            self._results[:] = results  # a step that failed holds one

    def _capture_step(self, work: Work) -> Work:
        """A decode step as one launch, where the model can be captured."""
        return self.queue.capture(work) if self._decoder.captured else work

    def _capture(self, bound: PoolBinding, on_progress: Progress) -> None:
        """In place of what was captured before."""
        bound.upload.send((self._header([]),))  # captures run on padding alone
        bound.graphs.capture_all(on_progress)
        if self._adapters is not None:
            bound.adapted.capture_all(on_progress)
        bound.edited.capture_all(no_progress)
        if self.drafts is not None:
            bound.accepted.capture_all(no_progress)
            if self._eagle is not None:
                bound.proposed.capture_all(no_progress)
        bound.chunk_steps[:] = self._capture_chunks(bound) if self._decoder.captured else ()
        if self._adapters is not None:
            bound.adapted_chunk_steps[:] = self._capture_chunks(bound, adapter=0)

    def _time_steps(self, bound: PoolBinding) -> None:
        """What steps of each size take without context, for the budget of drafts."""
        bound.upload.send((self._header([]),))  # all padding
        for size in sizes_up_to(self._limits.decode_tokens):
            graph = bound.graphs.graph_for(size, 1)
            begun = self.queue.mark()
            for _ in range(TIMED_STEPS):
                self.queue.enqueue(graph)
            ended = self.queue.mark()
            ended.wait()
            self.budget.measured(size, ended.since(begun) / TIMED_STEPS or 1.0)
        for size in sizes_up_to(self._limits.max_rows) if self._eagle is not None else ():
            begun = self.queue.mark()
            self.queue.enqueue(bound.proposed.graph_for(size, 1))
            ended = self.queue.mark()
            ended.wait()
            self.budget.measured_chain(size, ended.since(begun))

    def _capture_chunks(self, bound: PoolBinding, adapter: int | None = None) -> Iterator[CapturedChunks]:
        """Small steps of prompts, whose launches would take the host longer than the GPU; for rows with adapters if one
        is given."""
        tile, heads, width = bound.attention.tile, self._own.num_heads, bound.slots.tables.shape[1]
        if self._latents is not None:  # more slices are more launches, whether the context has them or not
            widest = self._latents.table_width(CHUNK_SEQUENCES, bound.block_tokens)
            width = min(width, widest // TABLE_WIDTH * TABLE_WIDTH)
        draw = Draw(SamplingSpec(max_tokens=1, temperature=0.0), (), 1, 0)
        for tokens, least in CHUNK_SIZES if width else ():
            items = (-(-tokens // tile) + CHUNK_SEQUENCES) * heads
            shape = ChunkShape(tokens, least, CHUNK_SEQUENCES, width, items)
            if self._limits.max_tokens >= tokens and self._limits.max_rows >= CHUNK_SEQUENCES:
                row = Row([0], 0, [0], draw, adapter=adapter)
                one = lay_out([row], bound.block_tokens, heads, tile)
                padded = shape.padded(one, bound.slots.padding)
                sent = bound.chunk_upload.send((*padded, *self._lay_out_adapters([row], 0, tokens)))
                yield CapturedChunks(shape, self.queue.capture(self._prefill_body(sent)))

    def _plan(self, num_rows: int, max_tokens: int) -> DecodePlan:
        kv_heads, num_sms = self._own.num_kv_heads, self.queue.num_sms
        if self.config.latent is not None:
            deterministic = self._limits.deterministic
            return plan_latent_rows(num_rows, self._own.num_heads, max_tokens, num_sms, deterministic)
        aim = FP8_AIM if self.kv_format.quantised else 1
        queries = 1 if self.drafts is None else queries_of(self.config.group_size)
        if self._limits.deterministic:
            return fixed_plan(num_rows, kv_heads, max_tokens, num_sms, aim=aim, queries=queries)
        return split_plan(num_rows, kv_heads, num_sms, aim, queries)

    def _bind(self) -> PoolBinding:
        if self._bound is None:
            raise InvariantBroken("no pool is bound")
        return self._bound
