"""What the GPU keeps for each slot to draw its tokens, and the drawing, with what models.sampler does on the CPU.

    sampler.set_row(slot, draw); sampler.flush()                  # host to device, what changed
    sampler.draw(logits, slots, positions, out)                   # temperature alone: what most rows want
    sampler.draw_edited(logits, slots, positions, out)            # everything, for a step with a row that `edits`
    sampler.logprobs(logits, slots, out)                          # for a step with a row that wants them

The three last only launch kernels on fixed memory, so a graph can hold them.
"""

from __future__ import annotations

import numpy as np
import torch

from baton.kernels.triton import sampling_rows as columns
from baton.kernels.triton.logprobs import LogprobRows, logprobs
from baton.kernels.triton.sampling import SamplingScratch, draw
from baton.kernels.triton.sampling_filter import FilterScratch, thresholds
from baton.kernels.triton.sampling_rows import Prepared, SlotTables, draw_prepared, prepare
from baton.kernels.triton.step_inputs import set_entries
from baton.models.batch import Draw
from baton.models.cpu.sampler import GREEDY_BELOW, has_penalty
from baton.models.cuda.queue import Queue
from baton.models.cuda.upload import Upload
from baton.node.messages.control import SamplingParams


class SlotSampler:
    """`num_slots` slots and the one of padding behind them; steps of up to max_rows rows that draw."""

    def __init__(self, queue: Queue, num_slots: int, max_rows: int, vocab_size: int) -> None:
        device = queue.device
        self._queue, self._vocab_size = queue, vocab_size
        self._tables = SlotTables.make(num_slots + 1, vocab_size, device)
        self._tables.table[:, columns.NUM_TOP.value] = -1
        self._prepared = Prepared.make(max_rows, vocab_size, device)
        self._filter = FilterScratch.make(max_rows, vocab_size, device)
        self.found = LogprobRows.make(max_rows, vocab_size, device)
        self._row_temperatures = torch.zeros(max_rows, dtype=torch.float32, device=device)
        self._row_seeds = torch.zeros(max_rows, 1, dtype=torch.int64, device=device)
        self._scratch = SamplingScratch.make(max_rows, vocab_size, device)
        self._upload = Upload(queue, 2 * num_slots * columns.COLUMNS.value)
        self._changed: dict[int, np.ndarray] = {}
        self._edits: set[int] = set()
        self._logprobs: dict[int, int] = {}  # likeliest tokens to name, by slot

    def set_row(self, slot: int, draw: Draw) -> None:
        """From the next `flush` on this slot draws so; its penalties count the tokens of draw.history."""
        sampling = draw.sampling
        self._changed[slot] = _entry(draw, self._vocab_size)
        self._edits.discard(slot)
        self._logprobs.pop(slot, None)
        if edits(sampling, self._vocab_size):
            self._edits.add(slot)
        if sampling.logprobs:
            self._logprobs[slot] = min(sampling.top_logprobs, self._vocab_size)
        bias = [(token, value) for token, value in _bias_sums(sampling) if token < self._vocab_size]
        self._put(self._tables.bias_ids[slot], np.array([token for token, _ in bias], np.int32))
        self._put(self._tables.bias_values[slot], np.array([value for _, value in bias], np.float32))
        if sampling.min_tokens:
            self._put(self._tables.stop_ids[slot], np.array(_stops(sampling, self._vocab_size), np.int32))
        if has_penalty(sampling):
            self._count(self._tables.counts[slot], np.array(draw.history, np.int32), draw.prompt_len)

    def flush(self) -> None:
        """Enqueue what changed."""
        if not self._changed:
            return
        width = columns.COLUMNS.value
        slots = np.array(list(self._changed), dtype=np.int32)
        places = slots[:, None] * width + np.arange(width, dtype=np.int32)
        sent_places, sent = self._upload.send((places, np.stack(list(self._changed.values()))))
        self._queue.enqueue(lambda: set_entries(self._tables.table.view(-1), sent_places, sent))
        self._changed.clear()

    def edits(self, slot: int) -> bool:
        """Whether the slot's row needs draw_edited."""
        return slot in self._edits

    def num_top(self, slot: int) -> int | None:
        """How many likeliest tokens the slot's row names beside its logprob; None: it wants no logprob."""
        return self._logprobs.get(slot)

    def draw(self, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> None:
        """out int32 [rows]: the next token of each; logits [rows, V], slots and positions of the new tokens int32."""
        count, table = len(slots), self._tables.table
        temperatures, seeds = self._row_temperatures[:count], self._row_seeds[:count]
        kept = table[:, columns.TEMPERATURE.value].view(torch.float32)
        torch.index_select(kept, 0, slots, out=temperatures)
        first = columns.SEED.value
        torch.index_select(table[:, first : first + 2].view(torch.int64), 0, slots, out=seeds)
        draw(logits, temperatures, seeds.view(-1), positions, self._scratch, out)

    def draw_edited(
        self, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, out: torch.Tensor
    ) -> None:
        """As `draw`, with every parameter; what it draws counts for the penalties of the next."""
        prepare(logits, slots, positions, self._tables, self._prepared)
        thresholds(self._prepared, slots, self._tables, self._filter)
        best = (self._scratch.values, self._scratch.tokens)
        draw_prepared(logits, slots, positions, self._tables, self._prepared, self._filter.thresholds, best, out)

    def logprobs(self, logits: torch.Tensor, slots: torch.Tensor, drawn: torch.Tensor) -> None:
        """`found` of the rows that want log probabilities of the `drawn` and the likeliest tokens."""
        logprobs(logits, slots, drawn, self._tables, self.found)

    def _put(self, target: torch.Tensor, values: np.ndarray) -> None:
        """target[:n] = values on the device."""
        if values.size:
            sent = self._sent(values.view(np.int32))
            self._queue.enqueue(lambda: _copy(target[: len(sent)].view(torch.int32), sent))

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


def edits(sampling: SamplingParams, vocab_size: int) -> bool:
    """Whether a draw needs more than a temperature."""
    filters = sampling.min_p > 0.0 or sampling.top_p < 1.0 or 0 < sampling.top_k < vocab_size
    random = sampling.temperature >= GREEDY_BELOW
    stops = sampling.min_tokens > 0 and bool(sampling.stop_token_ids)
    return (random and filters) or stops or bool(sampling.logit_bias) or has_penalty(sampling)


def _entry(draw: Draw, vocab_size: int) -> np.ndarray:
    """The slot's line of the table, int32 [COLUMNS]."""
    sampling, line = draw.sampling, np.zeros(columns.COLUMNS.value, dtype=np.int32)
    floats = line.view(np.float32)
    random = sampling.temperature >= GREEDY_BELOW
    floats[columns.TEMPERATURE.value] = sampling.temperature if random else 0.0
    floats[columns.LOG_MIN_P.value] = torch.tensor(sampling.min_p).log() if sampling.min_p > 0.0 else -np.inf
    floats[columns.TOP_P.value] = sampling.top_p
    floats[columns.REPETITION.value] = sampling.repetition_penalty
    floats[columns.FREQUENCY.value] = sampling.frequency_penalty
    floats[columns.PRESENCE.value] = sampling.presence_penalty
    first = columns.SEED.value
    line[first : first + 2] = np.array([sampling.seed], dtype=np.int64).view(np.int32)
    line[columns.TOP_K.value] = sampling.top_k
    line[columns.MIN_UNTIL.value] = draw.prompt_len + sampling.min_tokens
    line[columns.NUM_BIAS.value] = sum(token < vocab_size for token, _ in _bias_sums(sampling))
    line[columns.NUM_STOPS.value] = len(_stops(sampling, vocab_size)) if sampling.min_tokens else 0
    line[columns.PREPARED.value] = edits(sampling, vocab_size)
    line[columns.PENALISED.value] = has_penalty(sampling)
    line[columns.NUM_TOP.value] = min(sampling.top_logprobs, vocab_size) if sampling.logprobs else -1
    return line


def _bias_sums(sampling: SamplingParams) -> list[tuple[int, float]]:
    """logit_bias with each token once."""
    sums: dict[int, float] = {}
    for token, value in sampling.logit_bias:
        sums[token] = sums.get(token, 0.0) + value
    return list(sums.items())


def _stops(sampling: SamplingParams, vocab_size: int) -> list[int]:
    return [token for token in sampling.stop_token_ids if token < vocab_size]


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source, non_blocking=True)
