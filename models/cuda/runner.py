"""One model on one GPU: launches steps that run ahead of the host, and reads them later.

    runner = CudaRunner(config, weights, queue, limits, max_len)  # weights and activations have their place now
    runner.bind_pool(pool, max_model_len, on_progress)       # compiles and captures the decode steps
    launched = runner.launch(rows); ...; launched.read()     # see models.batch

Rows that continue what their slots drew last run in a captured decode step (`decode_steps`), parts of prompts in
another launch (`chunk_steps`); where a step has both they are one pass over the weights (`mixed_steps`). What is no
larger than the host can launch in time is captured, but for attention (`prefill_pieces`). Whatever the host sends goes
through pinned memory, and nothing waits for the GPU but `read`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from baton.kernels.triton.pool import PagedPool
from baton.models.adapters.slots import NO_SLOTS, AdapterSlots
from baton.models.batch import DeviceTime, Draw, Launched, Row
from baton.models.config import ModelConfig
from baton.models.cuda.adapter_bank import BankSlots
from baton.models.cuda.adapter_layout import BankLayout, BankShape, WholeShape
from baton.models.cuda.adapter_steps import AdapterSteps
from baton.models.cuda.chunk_forward import CHUNK_SEQUENCES, ChunkForward
from baton.models.cuda.chunk_steps import ChunkSteps
from baton.models.cuda.chunk_upload import ChunkUpload
from baton.models.cuda.chunks import TABLE_WIDTH, decodes, num_tokens_of
from baton.models.cuda.context_memory import ContextMemory
from baton.models.cuda.decode_plans import DecodePlans
from baton.models.cuda.decode_rows import DecodeRows
from baton.models.cuda.decode_steps import DecodeSteps
from baton.models.cuda.decoder import DeviceDecoder
from baton.models.cuda.draft_budget import BudgetChoice, DraftBudget
from baton.models.cuda.draft_graphs import DraftGraphs
from baton.models.cuda.drafts import DraftSlots
from baton.models.cuda.eagle import DeviceEagle
from baton.models.cuda.graphs import sizes_up_to
from baton.models.cuda.launched import LaunchedStep, StepMarks, StepResult
from baton.models.cuda.limits import StepLimits, check_supported
from baton.models.cuda.mixed_steps import MixedSteps
from baton.models.cuda.peers import DevicePeers
from baton.models.cuda.pool_binding import PoolBinding, paged_pool
from baton.models.cuda.prefill_pieces import PrefillPieces
from baton.models.cuda.products import Policy, fastest, invariant
from baton.models.cuda.prompt_entries import PromptEntries
from baton.models.cuda.prompt_scores import PromptScorer, scored_parts
from baton.models.cuda.queue import Draws, Queue, QueueMark, aligned
from baton.models.cuda.residuals import Enter, EnteringResiduals, enter_nothing
from baton.models.cuda.slots import Slots, SlotSampler
from baton.models.cuda.step_decoder import StepDecoder
from baton.models.cuda.step_draws import StepDraws
from baton.models.cuda.warm_up import warm_up_steps
from baton.models.eagle_config import EagleConfig
from baton.models.eagle_weights import EagleWeights
from baton.models.kv_format import KvFormat
from baton.models.layer_order import no_tap
from baton.models.layer_weights import Weights
from baton.models.partition import ONLY_STAGE, WHOLE, Stage, part_of
from baton.models.weights import Progress, no_progress
from baton.node.errors import InvariantBroken, SettingsError
from baton.node.messages.control import SamplingSpec


class CudaRunner:
    """Launches steps of one model over one pool. One thread makes all calls.

    The last stage of a pipeline is one too, whose steps are of prompts alone; those before it are `AdvancingStage`s.
    """

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
        bank_memory: torch.Tensor | None = None,
        stage: Stage = ONLY_STAGE,
    ) -> None:
        """model: weights that run by the kernels here, or what computes steps in another way, with room for the limits.
        max_len: no sequence gets longer. policy: of matrix products, by default that of the limits. kv_format: by
        default keys and values are of the weights' dtype. peers: the weights are one rank's part; all ranks launch the
        same steps, and draw the same tokens. eagle: a draft, or the rank's part of it, whose layer lies behind
        the model's in the pool; it proposes in place of the search for matches. bank_memory: of the slots of adapters,
        as BankShape has it, where another process fills them. stage: the weights are of the last of several."""
        self._rank, self._stage = WHOLE if peers is None else peers.rank, stage
        own = part_of(config, self._rank, stage)
        check_supported(own)
        self.config, self._own, self._peers = config, own, peers
        self.run_ahead = limits.run_ahead
        self.queue, self._limits = queue, limits
        rows, row_tokens = limits.max_rows, limits.decode_tokens
        self._eagle: DeviceEagle | None = None
        if eagle is not None:
            self._eagle = DeviceEagle(*eagle, config.num_layers, limits.step_tokens, row_tokens, max_len, peers)
        self._entries = PromptEntries(queue, self._eagle, limits.step_tokens)
        self.adapters: AdapterSlots = NO_SLOTS
        self._adapters: AdapterSteps | None = None
        if limits.adapter_slots:
            self._adapters = self._make_adapters(model, bank_memory)
        self._decoder: StepDecoder = (
            model if not isinstance(model, Weights) else self._make_decoder(model, policy, max_len)
        )
        self.dtype = dtype = self._decoder.dtype
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
        widened = dtype if self.kv_format.quantised else None
        self._context = ContextMemory(own, model, queue, limits, max_len, widened)
        self._scorer = PromptScorer(limits, config.vocab_size, queue.device, self._whole)
        self._drawn = torch.zeros(row_tokens, dtype=torch.int32, device=queue.device)
        drafted = row_tokens if limits.most_drafts else 0
        self._results = [StepResult(queue, rows, limits.most_drafts, drafted) for _ in range(limits.run_ahead + 1)]
        self._entering: EnteringResiduals | None = None
        if stage.count > 1 and isinstance(self._decoder, DeviceDecoder):
            self._entering = EnteringResiduals(self._decoder.residual(limits.step_tokens), stage)
        self._last: QueueMark | None = None
        self._bound: PoolBinding | None = None
        self._longest = max_len

    def _make_decoder(self, weights: Weights, policy: Policy | None, max_len: int) -> StepDecoder:
        limits = self._limits
        return DeviceDecoder(
            self._own,
            weights,
            policy or (invariant if limits.deterministic else fastest),
            limits.step_tokens,
            limits.decode_tokens,
            max_len,
            None if self._peers is None else self._peers.sums,
            self._adapters,
            no_tap if self._eagle is None else self._eagle.tap,
            self._stage,
        )

    def _make_adapters(self, model: Weights | StepDecoder, memory: torch.Tensor | None) -> AdapterSteps:
        """With memory for the slots, which become `adapters`."""
        if not isinstance(model, Weights):
            raise SettingsError(f"--max-loras: {self.config.architecture} runs through transformers, without adapters")
        limits, rank = self._limits, self._rank
        layout, wholes = (
            BankLayout.of(
                self.config,
                rank,
                vocabulary=limits.adapter_vocabulary,
                latents=limits.adapter_latents,
                routers=limits.adapter_routers,
                experts=limits.adapter_experts,
            ),
            None,
        )
        if limits.adapter_wholes:
            wholes = WholeShape.of(self.config, rank)
        dtype, magnitudes = model.embedding.dtype, limits.adapter_magnitudes
        shape = BankShape(layout, limits.adapter_slots, limits.max_rank, dtype, wholes, magnitudes)
        self.adapters = slots = BankSlots(shape, self.queue.beside(), memory)
        return AdapterSteps(
            self.queue,
            slots,
            layout,
            limits.max_rows,
            limits.decode_tokens,
            limits.step_tokens,
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
        config, rank = self.config, self._rank
        layers = self._stage.layers(config.num_layers)
        kv_format = self.kv_format.part(layers, rank.key_heads(config.num_kv_heads))
        paged = paged_pool(pool, scales, self._own, len(layers) + (self._eagle is not None), kv_format)
        self._longest = max_model_len
        self._bound = self._bind_steps(paged, pool.shape[4])
        self.queue.rehearse(self._rehearse)
        self._bound.capture_all(on_progress)

    def _bind_steps(self, pool: PagedPool, block_tokens: int) -> PoolBinding:
        """All kinds of steps over this pool; they are not captured yet."""
        config, queue, limits, decoder, drafts = self._own, self.queue, self._limits, self._decoder, self.drafts
        width = aligned(-(-self._longest // block_tokens), TABLE_WIDTH)
        plans = DecodePlans(config, limits, queue.num_sms, self.kv_format.quantised)
        slots = Slots(limits.max_rows, width, queue.device)
        rows = DecodeRows(queue, limits, slots, block_tokens, self._longest, drafts)
        decoder.bind_pool(pool)
        if self._eagle is not None:
            sizes = sizes_up_to(limits.decode_tokens)
            self._eagle.bind_pool(pool, width, max(plans.of_drafts(size).num_chunks for size in sizes))
        draws = StepDraws(self._sampler, self._whole, self._drawn, slots, block_tokens, drafts, self._eagle)
        after = None
        if drafts is not None:
            after = DraftGraphs(queue, limits, rows, self._drawn, drafts, self._eagle, plans, self._sampler.draw)
        decode = DecodeSteps(queue, decoder, limits, self._longest, rows, plans, draws, self._adapters, after)
        attention = self._context.over_pool(pool)
        upload = ChunkUpload(queue, limits, slots, block_tokens, config.num_heads, attention, self._adapters)
        captured_width = self._context.captured_width(width, CHUNK_SEQUENCES, block_tokens)
        meet = no_meeting if self._peers is None else self._peers.meet
        entries, scorer = self._entries, self._scorer
        pieces = PrefillPieces(queue, decoder, limits, upload)
        forward = ChunkForward(queue, decoder, limits, upload, pieces, captured_width)
        chunks = ChunkSteps(queue, decoder, upload, forward, draws, entries, scorer, meet)
        mixed = MixedSteps(queue, decoder, limits, decode, upload, draws, entries, pieces)
        return PoolBinding(block_tokens, decode, forward, chunks, mixed, pieces, after, self._stage.count == 1)

    def warm_up(self) -> None:
        """Run steps of every size that has kernels of its own, so that no request waits for a compiler. The pool's
        first blocks are written: no sequence may own them yet."""
        bound = self._bind()
        for rows in warm_up_steps(self._limits, self._longest, bound.block_tokens):
            entering = None if self._entering is None else self._entering.of_zeros(num_tokens_of(rows))
            self.launch(rows, entering).read()
        if self.drafts is not None:  # a kernel of steps with masks
            self.drafts.offer([Row([0], 0, [0], Draw(SamplingSpec(max_tokens=1), (), 1, 0))])
        if bound.after is not None:
            self.budget.measure(bound.decode.times(), bound.after.times())

    def launch(self, rows: Sequence[Row], entering: torch.Tensor | None = None) -> Launched:
        """As models.batch.Runner says. entering: as AdvancingStage.advance."""
        return self.launch_chosen(rows, self.choose(rows), entering)

    def choose(self, rows: Sequence[Row]) -> BudgetChoice | None:
        """For the launch of these rows: the tokens of those that decode, drafts included; None: as many as rows, and so
        it is where logits are kept until masks come, while parts of prompts are computed. It depends on what steps took
        here, so of several ranks one chooses."""
        if self.drafts is None:
            return None
        for row in rows:
            if row.token_ids and row.draw is not None:
                self.budget.begin(row.slot)
        rows = self._share_masks(rows)
        decode, chunks = [row for row in rows if decodes(row)], [row for row in rows if not decodes(row)]
        masked = any(row.draw is not None and row.draw.is_masked for row in rows)
        if not decode or (masked and chunks) or self._bind().mixed.takes(decode, chunks):
            return None
        certain = {
            row.slot: len(row.draw.forced) - (not row.token_ids)  # the first one is drawn by a step in flight
            for row in decode
            if row.draw is not None and row.draw.forced
        }
        return self.budget.choose(((row.slot, row.most_drafts) for row in decode), certain)

    def launch_chosen(
        self, rows: Sequence[Row], choice: BudgetChoice | None, entering: torch.Tensor | None = None
    ) -> Launched:
        """As `launch`, with what `choose` says of these rows, here or at another rank."""
        if not self._results:
            raise InvariantBroken(f"more than {self.run_ahead + 1} steps are launched and not read")
        staged = self._entering is not None
        decode = [index for index, row in enumerate(rows) if decodes(row) and not staged]
        chunks = [index for index, row in enumerate(rows) if not decodes(row) or staged]
        drawing = decode + [index for index in chunks if rows[index].draw is not None]
        masked = [row.slot for row in rows if row.draw is not None and row.draw.is_masked]
        draws = Draws(self.queue, deferred=bool(masked))
        result = self._results.pop()
        self._begin(rows)
        rows = self._share_masks(rows)
        own, parts = [rows[index] for index in decode], [rows[index] for index in chunks]
        offered: Callable[[], Sequence[Sequence[int]]] = tuple
        if masked and choice is not None:
            offered = self._offer(rows, result)
        enter = enter_nothing if self._entering is None else self._entering.of(entering, num_tokens_of(rows))
        begun = self._launch_both(own, parts, result, draws, choice, enter)
        num_tops = [self._sampler.num_top(rows[index].slot) for index in drawing]
        before = self._last or begun
        computed = self.queue.mark() if masked else None
        scored = scored_parts(rows, chunks)

        def end(masks: np.ndarray | None) -> StepMarks:
            came = None
            if masks is not None:
                came = self.queue.mark()
                self._sampler.set_masks(masked, [len(own) for own in offered()] or [0] * len(masked), masks)
                draws.enqueue()
            if self._peers is not None:
                self.queue.enqueue(self._peers.bring)
            self._last = self.queue.mark()
            return StepMarks(before, begun, self._last, computed, came)

        marks = None if masked else end(None)
        learn = None if choice is None else partial(self._learn, choice, alone=not chunks)
        check = None if self._peers is None else self._peers.check
        return LaunchedStep(
            marks,
            result,
            drawing,
            num_tops,
            len(rows),
            self._results.append,
            end,
            scored,
            learn,
            check,
            offered=offered,
        )

    @property
    def score_bytes(self) -> int:
        """Memory of the device that log probabilities of prompts take, whether any are asked for or not."""
        return self._scorer.found.size_bytes

    def logits(self, rows: Sequence[Row]) -> torch.Tensor:
        """Of parts of prompts, [rows that draw, vocab], valid until the next step: for tests; waits."""
        result = self._results[-1]
        self._bind().chunks.launch(rows, result, 0, Draws(self.queue, deferred=False))
        count, found = sum(row.draw is not None for row in rows), list[torch.Tensor]()
        self.queue.enqueue(lambda: found.append(self._whole(self._decoder.last_logits(count))))
        self.queue.mark().wait()
        return found[0]

    def _whole(self, logits: torch.Tensor) -> torch.Tensor:
        """Of all tokens, [rows, vocab]; where ranks share them all ranks call this."""
        return logits if self._peers is None else self._peers.whole(logits)

    def _begin(self, rows: Sequence[Row]) -> None:
        """What slots must know of rows that bring their own tokens."""
        for row in rows:
            if row.token_ids and row.draw is not None:
                self._sampler.set_row(row.slot, row.draw)
                if self.drafts is not None:
                    self.drafts.begin(row, self._longest)
        self._sampler.flush()
        if self.drafts is not None:
            self.drafts.flush()

    def _share_masks(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows, of which the masked ones have no more drafts than masks are made for: for all together as many as a
        step has tokens."""
        num_masked = sum(row.draw is not None and row.draw.is_masked for row in rows)
        if not num_masked:
            return rows
        most = self._limits.decode_tokens // num_masked
        return [
            row._replace(most_drafts=min(row.most_drafts, most)) if row.draw is not None and row.draw.is_masked else row
            for row in rows
        ]

    def _offer(self, rows: Sequence[Row], result: StepResult) -> Callable[[], Sequence[Sequence[int]]]:
        """Puts forced tokens before the drafts of masked rows; what says, later, which drafts each of these has."""
        assert self.drafts is not None, "a runner without drafts"
        masked = [row for row in rows if row.draw is not None and row.draw.is_masked]
        asked = [row for row in masked if row.most_drafts]
        offered = self.drafts.offer(asked)
        self.queue.enqueue(lambda: result.take_offered(offered))
        taken = self.queue.mark()

        def read() -> Sequence[Sequence[int]]:
            taken.wait()
            drafts = iter(result.offered(len(asked)))
            return [next(drafts)[: row.most_drafts] if row.most_drafts else () for row in masked]

        return read

    def _learn(self, choice: BudgetChoice, result: StepResult, took: DeviceTime, *, alone: bool) -> None:
        """alone: the step had no part of a prompt."""
        self.budget.read(choice, result.drafts(len(choice.slots)), took.busy_s - took.mask_wait_s if alone else None)

    def _launch_both(
        self,
        decode: Sequence[Row],
        chunks: Sequence[Row],
        result: StepResult,
        draws: Draws,
        choice: BudgetChoice | None,
        enter: Enter,
    ) -> QueueMark:
        """Of either kind there may be none. Returns the step's begin on the device."""
        bound = self._bind()
        if bound.mixed.takes(decode, chunks):
            result.place_chunks(0, 0)
            return bound.mixed.launch(decode, chunks, result, draws)
        begun = []
        result.place_chunks(len(decode), len(decode) if choice is None else choice.tokens)
        if decode:
            keep_logits = draws.deferred and bool(chunks)
            begun.append(bound.decode.launch(decode, result, draws, choice, keep_logits=keep_logits))
        if chunks:
            begun.append(bound.chunks.launch(chunks, result, len(decode), draws, enter))
        return begun[0]

    def _rehearse(self) -> None:
        """All that is launched before the first request, whatever part of it a GPU is wanted for."""
        results = list(self._results)
        try:
            with self._decoder.abridged():
                self._bind().capture_all(no_progress)
                self.warm_up()
        finally:
            self._results[:] = results  # a step that failed holds one

    def _bind(self) -> PoolBinding:
        if self._bound is None:
            raise InvariantBroken("no pool is bound")
        return self._bound


def no_meeting() -> None:
    """A rank alone waits for no other."""
