"""What the GPU keeps for each slot from step to step: the last drawn token, the block table, and how to draw.

A slot belongs to one running sequence, as the worker decides. `Slots` has what the next step computes with, and
`SlotSampler` draws by models.sampling_rules:

    sampler.set_row(slot, draw); sampler.flush()                  # host to device, what changed
    sampler.draw(logits, slots, positions, out)                   # temperature alone: what most rows want
    sampler.draw_edited(logits, slots, positions, out)            # everything, for a step with a row that needs it
    sampler.logprobs(logits, slots, out)                          # for a step with a row that wants them

The three last only launch kernels on fixed memory, so a graph can hold them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from baton.kernels.triton import sampling_rows as columns
from baton.kernels.triton.draft_inputs import LENGTH
from baton.kernels.triton.drafts import SlotDrafts
from baton.kernels.triton.logprobs import LogprobRows, logprobs
from baton.kernels.triton.sampling import SamplingScratch, draw
from baton.kernels.triton.sampling_filter import FilterScratch, thresholds
from baton.kernels.triton.sampling_rows import Prepared, SlotTables, draw_prepared, prepare
from baton.kernels.triton.step_inputs import set_entries
from baton.models.batch import Draw, Row
from baton.models.cuda.peers import DevicePeers
from baton.models.cuda.queue import ALIGNED, Queue, Upload, copy_async
from baton.models.sampling_rules import DrawRules, rules_of


class Slots:
    """Last tokens and block tables of `num_slots` slots, and of one more, `padding`, for rows that only fill a graph;
    tables of up to `width` blocks.

    A row that comes with its token begins anew: all of its table is sent. A row without token continues what its slot
    has: only blocks that are new are sent.
    """

    def __init__(self, num_slots: int, width: int, device: str) -> None:
        self.padding = num_slots
        self.last = torch.zeros(num_slots + 1, dtype=torch.int32, device=device)
        self.tables = torch.zeros(num_slots + 1, width, dtype=torch.int32, device=device)
        self._width = width
        self._held = [0] * num_slots  # blocks that the device knows of each slot

    def begin(self, slot: int) -> None:
        """What the device has of this slot is not the new row's."""
        self._held[slot] = 0

    def changes(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
        """Places in the flat tables, and the blocks to put there, int32 each; from now on they count as sent."""
        places: list[int] = []
        blocks: list[int] = []
        for row in rows:
            if row.token_ids:
                self._held[row.slot] = 0
            held, known = self._held[row.slot], len(row.blocks)
            if held < known:
                places.extend(range(row.slot * self._width + held, row.slot * self._width + known))
                blocks.extend(row.blocks[held:known])
                self._held[row.slot] = known
        return np.array(places, dtype=np.int32), np.array(blocks, dtype=np.int32)


class SlotSampler:
    """`num_slots` slots and the one of padding behind them; steps of up to max_rows rows that draw."""

    def __init__(
        self,
        queue: Queue,
        num_slots: int,
        max_rows: int,
        vocab_size: int,
        peers: DevicePeers | None = None,
        drafts: SlotDrafts | None = None,
    ) -> None:
        """peers: `draw` gets this rank's part of the logits, and draws with the others; the rest gets all logits.
        drafts: a step may draw several tokens of a slot, and what accepts them counts them in `tables`."""
        device = queue.device
        self._ranks = None if peers is None else peers.drawn
        self._first_token = 0 if peers is None else peers.first_token
        self._queue, self._vocab_size = queue, vocab_size
        self._drafted = None if drafts is None else (drafts.state[:, LENGTH.value], drafts.drafts)
        most_drafts = 0 if drafts is None else drafts.drafts.shape[1]
        self.tables = SlotTables.make(num_slots + 1, vocab_size, device, most_drafts)
        self._most_masks = num_slots + max_rows if most_drafts else num_slots
        self.tables.table[:, columns.NUM_TOP.value] = -1
        self._prepared = Prepared.make(max_rows, vocab_size, device)
        self._filter = FilterScratch.make(max_rows, vocab_size, device)
        self.found = LogprobRows.make(max_rows, vocab_size, device)
        self._row_temperatures = torch.zeros(max_rows, dtype=torch.float32, device=device)
        self._row_seeds = torch.zeros(max_rows, 1, dtype=torch.int64, device=device)
        self._scratch = SamplingScratch.make(max_rows, vocab_size, device)
        self._upload = Upload(queue, 2 * num_slots * columns.COLUMNS.value)
        self._masks: Upload | None = None
        self._changed: dict[int, np.ndarray] = {}
        self._edited: set[int] = set()  # slots that need more than a temperature
        self._logprobs: dict[int, int] = {}  # likeliest tokens to name, by slot

    def set_row(self, slot: int, draw: Draw) -> None:
        """From the next `flush` on this slot draws so; its penalties and bad words know the tokens of draw.history."""
        rules = rules_of(draw.sampling, self._vocab_size)
        self._changed[slot] = _entry(rules, draw.prompt_len)
        self._edited.discard(slot)
        self._logprobs.pop(slot, None)
        if rules.needs_more_than_temperature:
            self._edited.add(slot)
        if rules.num_top is not None:
            self._logprobs[slot] = rules.num_top
        self._put(self.tables.bias_ids[slot], np.array([token for token, _ in rules.bias], np.int32))
        self._put(self.tables.bias_values[slot], np.array([value for _, value in rules.bias], np.float32))
        self._put(self.tables.stop_ids[slot], np.array(rules.forbidden, np.int32))
        if rules.allowed:
            self._put(self.tables.masks[slot, 0], _mask(rules.allowed, self._vocab_size))
        if rules.bad_words:
            self._put(self.tables.bad_words[slot].view(-1), _bad_words(rules.bad_words))
            self._put(self.tables.recent[slot], _recent(draw.history[draw.prompt_len :], draw.prompt_len))
        if rules.is_penalised:
            self._count(self.tables.counts[slot], np.array(draw.history, np.int32), draw.prompt_len)

    def flush(self) -> None:
        """Enqueue what changed."""
        if not self._changed:
            return
        width = columns.COLUMNS.value
        slots = np.array(list(self._changed), dtype=np.int32)
        places = slots[:, None] * width + np.arange(width, dtype=np.int32)
        sent_places, sent = self._upload.send((places, np.stack(list(self._changed.values()))))
        self._queue.enqueue(lambda: set_entries(self.tables.table.view(-1), sent_places, sent))
        self._changed.clear()

    def set_masks(self, slots: Sequence[int], num_drafts: Sequence[int], masks: np.ndarray) -> None:
        """Enqueue the masks that the next draw of these slots keeps, of each its own and those of so many drafts; as
        models.batch.Launched has them. Of drafts no more than a step has rows."""
        _, width, words = self.tables.masks.shape
        if self._masks is None:  # few servers have any
            self._masks = Upload(self._queue, self._most_masks * (words + 1) + 2 * ALIGNED)
        places = [slot * width + place for slot, own in zip(slots, num_drafts, strict=True) for place in range(1 + own)]
        sent_places, sent = self._masks.send((np.array(places, dtype=np.int32), masks))

        def work() -> None:
            self.tables.masks.view(-1, words).index_copy_(0, sent_places.long(), sent.view(masks.shape))

        self._queue.enqueue(work)

    def edits(self, slot: int) -> bool:
        """Whether the slot's row needs draw_edited."""
        return slot in self._edited

    def num_top(self, slot: int) -> int | None:
        """How many likeliest tokens the slot's row names beside its logprob; None: it wants no logprob."""
        return self._logprobs.get(slot)

    def draw(self, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> None:
        """out int32 [rows]: the next token of each; logits [rows, V], slots and positions of the new tokens int32."""
        count, table = len(slots), self.tables.table
        temperatures, seeds = self._row_temperatures[:count], self._row_seeds[:count]
        kept = table[:, columns.TEMPERATURE.value].view(torch.float32)
        torch.index_select(kept, 0, slots, out=temperatures)
        first = columns.SEED.value
        torch.index_select(table[:, first : first + 2].view(torch.int64), 0, slots, out=seeds)
        seeds, first = seeds.view(-1), self._first_token
        draw(logits, temperatures, seeds, positions, self._scratch, out, ranks=self._ranks, first_token=first)

    def draw_edited(
        self, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, out: torch.Tensor
    ) -> None:
        """As `draw`, with every parameter; without drafts, what it draws counts for the penalties of the next."""
        prepare(logits, slots, positions, self.tables, self._prepared, self._drafted)
        thresholds(self._prepared, slots, self.tables, self._filter)
        best = (self._scratch.values, self._scratch.tokens)
        draw_prepared(
            logits, slots, positions, self.tables, self._prepared, self._filter.thresholds, best, out,
            counts=self._drafted is None,
        )  # fmt: skip

    def logprobs(self, logits: torch.Tensor, slots: torch.Tensor, drawn: torch.Tensor) -> None:
        """`found` of the rows that want log probabilities of the `drawn` and the likeliest tokens."""
        logprobs(logits, slots, drawn, self.tables, self.found)

    def _put(self, target: torch.Tensor, values: np.ndarray) -> None:
        """target[:n] = values on the device."""
        if values.size:
            sent = self._sent(values.view(np.int32))
            self._queue.enqueue(lambda: copy_async(target[: len(sent)].view(torch.int32), sent))

    def _count(self, counts: torch.Tensor, history: np.ndarray, prompt_len: int) -> None:
        """counts int32 [V] of a sequence, from its tokens."""
        sent = self._sent(history)

        def work() -> None:
            ids = sent.to(counts.device, non_blocking=True).long()
            counts.zero_()
            counts.index_fill_(0, ids[:prompt_len], columns.IN_PROMPT.value)
            counts.index_add_(0, ids[prompt_len:], torch.ones_like(ids[prompt_len:], dtype=torch.int32))

        self._queue.enqueue(work)

    def _sent(self, values: np.ndarray) -> torch.Tensor:
        """The values in memory of their own that copies without waiting; it lives until the copy has run."""
        buffer = self._queue.host_buffer(values.size)
        buffer.numpy()[:] = values
        return buffer


def _entry(rules: DrawRules, prompt_len: int) -> np.ndarray:
    """The slot's line of the table, int32 [COLUMNS]."""
    line = np.zeros(columns.COLUMNS.value, dtype=np.int32)
    floats = line.view(np.float32)
    for name, column in columns.FLOATS.items():
        floats[column.value] = getattr(rules, name)
    for name, column in columns.INTEGERS.items():
        line[column.value] = getattr(rules, name)
    floats[columns.LOG_MIN_P.value] = torch.tensor(rules.min_p).log() if rules.min_p > 0.0 else -np.inf
    first = columns.SEED.value
    line[first : first + 2] = np.array([rules.seed], dtype=np.int64).view(np.int32)
    line[columns.MIN_UNTIL.value] = prompt_len + rules.min_tokens
    line[columns.NUM_BIAS.value] = len(rules.bias)
    line[columns.NUM_STOPS.value] = len(rules.forbidden)
    line[columns.PREPARED.value] = rules.needs_more_than_temperature
    line[columns.PENALISED.value] = rules.is_penalised
    line[columns.MASKED.value] = 2 if rules.is_masked else bool(rules.allowed)
    line[columns.NUM_BAD_WORDS.value] = len(rules.bad_words)
    line[columns.NUM_TOP.value] = -1 if rules.num_top is None else rules.num_top
    return line


def _mask(token_ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """A slot's mask with the bits of these tokens, int32 [words]."""
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32).view(np.int32)


def _bad_words(words: Sequence[Sequence[int]]) -> np.ndarray:
    """A slot's bad words, int32, flat."""
    table = np.full((columns.MAX_BAD_WORD_TOKENS, columns.MAX_BAD_WORDS), -1, dtype=np.int32)
    for place, word in enumerate(words):
        table[-len(word) :, place] = word
    return table.ravel()


def _recent(generated: Sequence[int], prompt_len: int) -> np.ndarray:
    """A slot's last tokens, int32 [MAX_BAD_WORD_TOKENS]."""
    recent = np.full(columns.MAX_BAD_WORD_TOKENS, -1, dtype=np.int32)
    first = max(0, len(generated) - columns.MAX_BAD_WORD_TOKENS)
    for place, token in enumerate(generated[first:], prompt_len + first):
        recent[place % columns.MAX_BAD_WORD_TOKENS] = token
    return recent
