"""A draw with every sampling parameter, for rows whose parameters lie on the device in the table of their slot.

    x = logits, or -inf where the mask's bit is 0;  x = x + bias;  x[stop ids] = -inf while position < MIN_UNTIL
    x[last token of a bad word] = -inf where the row's last tokens are those before it
    x = x > 0 ? x / repetition : x * repetition      of tokens seen in prompt or output
    x = x - frequency * times in the output;  x = x - presence    of tokens in the output
    greedy: token = argmax x
    else:   x = x / temperature;  token = argmax(x + Gumbel noise) of the tokens with x >= threshold

The operations and their order are those of the CPU's sampler, each rounded alone (no fused multiply-add). The
threshold is that of sampling_filter. Rows are independent: a row alone draws what it draws among others. A row that
asks for nothing but a temperature is read once from the logits; the others are first written out edited ("prepared"),
which the filter and the draw then read. Bytes: of a prepared row the logits once, the float32 copy twice, and its
counts if it has penalties.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from baton.kernels.triton.launch import cdiv, next_power_of_2, require
from baton.kernels.triton.sampling import gumbel, uniforms

BLOCK, WARPS = 4096, 8
MAX_BIAS, MAX_STOPS = 1024, 128
MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS = 128, 32

# Columns of the table, int32; those marked f hold the bits of a float32.
TEMPERATURE = tl.constexpr(0)  # f; 0: greedy
LOG_MIN_P = tl.constexpr(1)  # f; -inf: off
SEED = tl.constexpr(2)  # two words, the lower first
TOP_P = tl.constexpr(4)  # f; 1 or more: off
TOP_K = tl.constexpr(5)  # 0: off
MIN_UNTIL = tl.constexpr(6)  # stops are suppressed at positions below it
NUM_BIAS = tl.constexpr(7)
NUM_STOPS = tl.constexpr(8)
REPETITION = tl.constexpr(9)  # f
FREQUENCY = tl.constexpr(10)  # f
PRESENCE = tl.constexpr(11)  # f
PREPARED = tl.constexpr(12)  # 1: anything beyond a temperature
PENALISED = tl.constexpr(13)  # 1: the counts of the slot are kept
NUM_TOP = tl.constexpr(14)  # likeliest tokens to name with the logprob; -1: no logprob
MASKED = tl.constexpr(15)  # tokens must have a bit: 1: in the slot's first mask; 2: in the one behind the same draft
NUM_BAD_WORDS = tl.constexpr(16)  # above 0: the slot's last tokens are kept
COLUMNS = tl.constexpr(20)

# Columns that hold a parameter as it is, by its name in models.sampling_rules.
FLOATS = {
    "temperature": TEMPERATURE,
    "top_p": TOP_P,
    "repetition_penalty": REPETITION,
    "frequency_penalty": FREQUENCY,
    "presence_penalty": PRESENCE,
}
INTEGERS = {"top_k": TOP_K}

IN_PROMPT = tl.constexpr(1 << 30)  # bit of a count; the rest counts the output


@dataclass(frozen=True, slots=True)
class SlotTables:
    """What the device keeps of each slot."""

    table: torch.Tensor  # int32 [slots, COLUMNS]
    bias_ids: torch.Tensor  # int32 [slots, MAX_BIAS], different in a row
    bias_values: torch.Tensor  # float32 [slots, MAX_BIAS]
    stop_ids: torch.Tensor  # int32 [slots, MAX_STOPS]
    counts: torch.Tensor  # int32 [slots, V]
    masks: torch.Tensor  # int32 [slots, 1 + drafts, ceil(V / 32)]: bit v % 32 of word v // 32 belongs to token v; first
    # what may follow the known tokens, then what may follow each draft
    bad_words: torch.Tensor  # int32 [slots, MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS]: ends last, -1 before a shorter one
    recent: torch.Tensor  # int32 [slots, MAX_BAD_WORD_TOKENS]: of position p at p % MAX_BAD_WORD_TOKENS; -1: a prompt's

    @classmethod
    def make(cls, num_slots: int, vocab_size: int, device: str, most_drafts: int = 0) -> SlotTables:
        """All zero: greedy rows that ask for nothing. The counts are four bytes a slot and token."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            table=zeros(num_slots, COLUMNS.value),
            bias_ids=zeros(num_slots, MAX_BIAS),
            bias_values=zeros(num_slots, MAX_BIAS, dtype=torch.float32),
            stop_ids=zeros(num_slots, MAX_STOPS),
            counts=zeros(num_slots, vocab_size),
            masks=zeros(num_slots, 1 + most_drafts, cdiv(vocab_size, 32)),
            bad_words=zeros(num_slots, MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS),
            recent=zeros(num_slots, MAX_BAD_WORD_TOKENS),
        )


@dataclass(frozen=True, slots=True)
class Prepared:
    """The rows of a step that are prepared; the others' places hold nothing of meaning."""

    values: torch.Tensor  # float32 [rows, V]: edited, and divided by the temperature
    largest: torch.Tensor  # float32 [rows, blocks]: of each block of them

    @classmethod
    def make(cls, num_rows: int, vocab_size: int, device: str) -> Prepared:
        def empty(width: int) -> torch.Tensor:
            return torch.empty(num_rows, width, dtype=torch.float32, device=device)

        return cls(empty(vocab_size), empty(cdiv(vocab_size, BLOCK)))


@triton.jit
def table_float(table_ptr, slot, COLUMN: tl.constexpr):
    return tl.load(table_ptr + slot * COLUMNS + COLUMN).to(tl.float32, bitcast=True)


@triton.jit
def _prepare_kernel(
    logits_ptr, slot_ptr, position_ptr, table_ptr, bias_id_ptr, bias_value_ptr, stop_ptr, count_ptr, mask_ptr,
    bad_word_ptr, recent_ptr, known_ptr, draft_ptr, known_stride, draft_stride, value_ptr, largest_ptr,
    DRAFTED: tl.constexpr, MASKS: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr, MAX_BIAS: tl.constexpr,
    MAX_STOPS: tl.constexpr, MAX_BAD_WORDS: tl.constexpr, MAX_BAD_WORD_TOKENS: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    entry = table_ptr + slot * COLUMNS
    if tl.load(entry + PREPARED) == 0:
        return
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < VOCAB
    place = value_ptr + row * VOCAB
    x = tl.load(logits_ptr + row * VOCAB + token, mask=inside, other=float("-inf")).to(tl.float32)
    position = tl.load(position_ptr + row)
    before_it = 0  # drafts before the token, which neither the counts nor the last tokens of the slot include
    if DRAFTED:
        before_it = tl.maximum(position - tl.load(known_ptr + slot * known_stride), 0)
    masked = tl.load(entry + MASKED)
    if masked != 0:
        mask = mask_ptr + (slot * MASKS + tl.where(masked > 1, tl.minimum(before_it, MASKS - 1), 0)) * tl.cdiv(
            VOCAB, 32
        )
        word = tl.load(mask + token // 32, mask=inside, other=0)
        x = tl.where((word >> (token % 32)) & 1 != 0, x, float("-inf"))
    num_bias, num_bad = tl.load(entry + NUM_BIAS), tl.load(entry + NUM_BAD_WORDS)
    num_stops = tl.where(position < tl.load(entry + MIN_UNTIL), tl.load(entry + NUM_STOPS), 0)
    if num_bias + num_stops + num_bad > 0:  # single tokens: through memory, where a program owns its block
        tl.store(place + token, x, mask=inside)
        tl.debug_barrier()
        for start in range(0, num_bias, 128):
            listed = start + tl.arange(0, 128)
            at = tl.load(bias_id_ptr + slot * MAX_BIAS + listed, mask=listed < num_bias, other=-1)
            mine = (at >= block * BLOCK) & (at < (block + 1) * BLOCK)
            bias = tl.load(bias_value_ptr + slot * MAX_BIAS + listed, mask=mine, other=0.0)
            tl.store(place + at, tl.load(place + at, mask=mine, other=0.0) + bias, mask=mine)
        tl.debug_barrier()
        if num_stops > 0:
            listed = tl.arange(0, MAX_STOPS)
            at = tl.load(stop_ptr + slot * MAX_STOPS + listed, mask=listed < num_stops, other=-1)
            mine = (at >= block * BLOCK) & (at < (block + 1) * BLOCK)
            tl.store(place + at, tl.full([MAX_STOPS], float("-inf"), tl.float32), mask=mine)
        if num_bad > 0:
            listed = tl.arange(0, MAX_BAD_WORDS)
            words = bad_word_ptr + slot * MAX_BAD_WORD_TOKENS * MAX_BAD_WORDS + listed
            at = tl.load(words + (MAX_BAD_WORD_TOKENS - 1) * MAX_BAD_WORDS, mask=listed < num_bad, other=-1)
            mine = (at >= block * BLOCK) & (at < (block + 1) * BLOCK)
            for back in range(1, MAX_BAD_WORD_TOKENS):
                before = tl.load(words + (MAX_BAD_WORD_TOKENS - 1 - back) * MAX_BAD_WORDS, mask=mine, other=-1)
                turn = (position + MAX_BAD_WORD_TOKENS - back) % MAX_BAD_WORD_TOKENS
                last = tl.load(recent_ptr + slot * MAX_BAD_WORD_TOKENS + turn)
                if DRAFTED:
                    drafted = draft_ptr + slot * draft_stride + tl.maximum(before_it - back, 0)
                    last = tl.where(back <= before_it, tl.load(drafted), last)
                mine = mine & ((before < 0) | (before == last))
            tl.store(place + at, tl.full([MAX_BAD_WORDS], float("-inf"), tl.float32), mask=mine)
        tl.debug_barrier()
        x = tl.load(place + token, mask=inside, other=float("-inf"))
    if tl.load(entry + PENALISED) != 0:
        count = tl.load(count_ptr + slot * VOCAB + token, mask=inside, other=0)
        if DRAFTED:
            for number in range(0, before_it):
                count += (token == tl.load(draft_ptr + slot * draft_stride + number)).to(tl.int32)
        drawn = count & (IN_PROMPT - 1)
        repetition = table_float(table_ptr, slot, REPETITION)
        x = tl.where(count != 0, tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + repetition), x * repetition), x)
        x = x - table_float(table_ptr, slot, FREQUENCY) * drawn.to(tl.float32)
        x = x - table_float(table_ptr, slot, PRESENCE) * (drawn > 0).to(tl.float32)
    temperature = table_float(table_ptr, slot, TEMPERATURE)
    if temperature > 0.0:
        x = tl.div_rn(x, tl.zeros_like(x) + temperature)
    tl.store(place + token, x, mask=inside)
    tl.store(largest_ptr + row * tl.num_programs(1) + block, tl.max(x, 0))


@triton.jit
def _best_of_block_kernel(
    logits_ptr, prepared_ptr, slot_ptr, position_ptr, threshold_ptr, table_ptr, value_ptr, token_ptr,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < VOCAB
    temperature = table_float(table_ptr, slot, TEMPERATURE)
    if tl.load(table_ptr + slot * COLUMNS + PREPARED) != 0:
        x = tl.load(prepared_ptr + row * VOCAB + token, mask=inside, other=float("-inf"))
        x = tl.where(x >= tl.load(threshold_ptr + row), x, float("-inf"))
    else:
        x = tl.load(logits_ptr + row * VOCAB + token, mask=inside, other=float("-inf")).to(tl.float32)
        if temperature > 0.0:
            x = x / temperature
    if (temperature > 0.0) & (tl.max(x, 0) > float("-inf")):  # noise is most of the work: not for a block filtered away
        low = tl.load(table_ptr + slot * COLUMNS + SEED).to(tl.uint32).to(tl.uint64)
        seed = low + (tl.load(table_ptr + slot * COLUMNS + SEED + 1).to(tl.uint64) << 32)
        x = x + gumbel(uniforms(seed, tl.load(position_ptr + row), block * BLOCK, BLOCK))
    best, place = tl.max(x, 0, return_indices=True)
    tl.store(value_ptr + row * tl.num_programs(1) + block, best)
    tl.store(token_ptr + row * tl.num_programs(1) + block, block * BLOCK + place)


@triton.jit
def _best_of_row_kernel(
    slot_ptr, position_ptr, table_ptr, count_ptr, recent_ptr, value_ptr, token_ptr, out_ptr,
    VOCAB: tl.constexpr, BLOCKS: tl.constexpr, BLOCKS_PADDED: tl.constexpr, MAX_BAD_WORD_TOKENS: tl.constexpr,
    COUNTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    block = tl.arange(0, BLOCKS_PADDED)
    values = tl.load(value_ptr + row * BLOCKS + block, mask=block < BLOCKS, other=float("-inf"))
    _, place = tl.max(values, 0, return_indices=True)
    token = tl.load(token_ptr + row * BLOCKS + place)
    tl.store(out_ptr + row, token.to(out_ptr.dtype.element_ty))
    if not COUNTS:
        return
    if tl.load(table_ptr + slot * COLUMNS + PENALISED) != 0:
        counted = count_ptr + slot * VOCAB + token
        tl.store(counted, tl.load(counted) + 1)
    if tl.load(table_ptr + slot * COLUMNS + NUM_BAD_WORDS) != 0:
        turn = tl.load(position_ptr + row) % MAX_BAD_WORD_TOKENS
        tl.store(recent_ptr + slot * MAX_BAD_WORD_TOKENS + turn, token)


def prepare(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    tables: SlotTables,
    out: Prepared,
    drafted: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Writes the prepared rows; logits [rows, V], slots and the new tokens' positions int32 [rows].

    drafted: known tokens [slots] and drafts [slots, most drafts] behind them, int32; of a token at a position past them
    the drafts before it count as drawn.
    """
    num_rows, vocab_size = _checked(logits, slots, positions, tables, out)
    if num_rows:
        _prepare_kernel[(num_rows, cdiv(vocab_size, BLOCK))](
            logits, slots, positions, tables.table, tables.bias_ids, tables.bias_values, tables.stop_ids,
            tables.counts, tables.masks, tables.bad_words, tables.recent, *(drafted or (None, None)),
            *((0, 0) if drafted is None else (drafted[0].stride(0), drafted[1].stride(0))), out.values, out.largest,
            DRAFTED=drafted is not None, MASKS=tables.masks.shape[1], VOCAB=vocab_size, BLOCK=BLOCK, MAX_BIAS=MAX_BIAS,
            MAX_STOPS=MAX_STOPS, MAX_BAD_WORDS=MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS=MAX_BAD_WORD_TOKENS, num_warps=WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip


def draw_prepared(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    tables: SlotTables,
    prepared: Prepared,
    thresholds: torch.Tensor,
    best: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    counts: bool = True,
) -> None:
    """out [rows], int32 or int64: the tokens. counts: the counts and last tokens of rows that use them now include
    them, and of rows with penalties or bad words no two may have one slot; else what accepts drafts counts them.

    thresholds float32 [rows], read of prepared rows; best: float32 and int32 [rows, blocks], scratch.
    """
    num_rows, vocab_size = _checked(logits, slots, positions, tables, prepared)
    require(out.shape == (num_rows,) and thresholds.shape[0] >= num_rows, "out and thresholds need one a row")
    blocks = cdiv(vocab_size, BLOCK)
    require(all(each.numel() >= num_rows * blocks for each in best), "the scratch is too small")
    if num_rows == 0:
        return
    _best_of_block_kernel[(num_rows, blocks)](
        logits, prepared.values, slots, positions, thresholds, tables.table, *best, VOCAB=vocab_size, BLOCK=BLOCK,
        num_warps=WARPS,
    )  # fmt: skip
    _best_of_row_kernel[(num_rows,)](
        slots, positions, tables.table, tables.counts, tables.recent, *best, out, VOCAB=vocab_size, BLOCKS=blocks,
        BLOCKS_PADDED=next_power_of_2(blocks), MAX_BAD_WORD_TOKENS=MAX_BAD_WORD_TOKENS, COUNTS=counts,
        num_warps=1,
    )  # fmt: skip


def _checked(
    logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, tables: SlotTables, prepared: Prepared
) -> tuple[int, int]:
    num_rows, vocab_size = logits.shape
    require(logits.is_contiguous(), "logits must be contiguous")
    require(slots.shape == positions.shape == (num_rows,), "slots and positions need one a row")
    require(slots.is_contiguous() and positions.is_contiguous(), "slots and positions must be contiguous")
    require(tables.counts.shape[1] == vocab_size == prepared.values.shape[1], "the tables are of another vocabulary")
    require(prepared.values.shape[0] >= num_rows, "there is no room for so many prepared rows")
    return num_rows, vocab_size
