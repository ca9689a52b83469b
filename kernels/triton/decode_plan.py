"""How decode attention shares out a step's sequences among programs. Pure arithmetic; `decode_work` carries it out.

A chunk of one sequence and one key head is one program. Few sequences need many chunks to fill the GPU; of many, only
those that are much longer than the others are cut.
"""

from __future__ import annotations

from dataclasses import dataclass

TILE = 64  # keys that a program reads at a time; chunks are multiples of it
SINGLE_WAVE = 4  # programs a multiprocessor holds at most
LONG, MOST_SPLITS, LONG_STAGES = 8192, 32, 3  # for few sequences of more tokens
FULL = 0.9  # a plan that fills this share of the places is taken before one that needs more programs


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """What can be said of a step before its sequences are known: how many chunks it has at most, and how large.

    chunk_tokens 0: chunks of nearly one size, `splits` a sequence in the mean. A sequence that is longer than the mean
    has more of them and a shorter one fewer, down to one. Else chunk i begins at token i * chunk_tokens.
    """

    num_chunks: int
    """Places for chunks, used or not."""
    num_stages: int
    """Of the pipeline, the block table's load included: 3, 5, 7 keep 1, 2, 3 tiles of keys and values in flight."""
    splits: int = 1
    chunk_tokens: int = 0


def split_plan(num_rows: int, kv_heads: int, max_tokens: int, num_sms: int) -> DecodePlan:
    """The fast plan for up to num_rows sequences of up to max_tokens: all programs resident at once, and the GPU nearly
    full.

    Follows the optima measured (docs/benchmarks/kernels.md): from about 32 rows of 8 heads on no split; up to 16 rows
    beyond 8k tokens four programs a multiprocessor, but no more chunks than 32 a sequence where two programs a
    multiprocessor are no more; one program alone on its multiprocessor needs the deepest pipeline.
    """
    programs = num_rows * kv_heads
    splits = 1
    if programs <= SINGLE_WAVE * num_sms:
        waves = [wave for wave in range(1, SINGLE_WAVE + 1) if wave * num_sms >= programs]
        shares = {wave: wave * num_sms // programs * programs / (wave * num_sms) for wave in waves}
        best = next((wave for wave in waves if shares[wave] >= FULL), max(waves, key=shares.__getitem__))
        splits = best * num_sms // programs
    long = max_tokens > LONG and programs <= num_sms
    if long:
        splits = min(max(MOST_SPLITS, 2 * num_sms // programs), SINGLE_WAVE * num_sms // programs)
    chunk = max(TILE, -(-max_tokens // splits // TILE) * TILE)
    splits = -(-max_tokens // chunk)
    stages = LONG_STAGES if long and programs * splits > num_sms else _stages(programs * splits, chunk, num_sms)
    return DecodePlan((splits + 1) * num_rows, stages, splits)


def fixed_plan(num_rows: int, kv_heads: int, max_tokens: int, num_sms: int, chunk_tokens: int = 512) -> DecodePlan:
    """The plan whose results do not depend on the batch: chunks of one size, whatever the rows and their lengths.

    Only how many tiles are in flight depends on the rows, and no sum depends on that (checked bit for bit on an H200).
    """
    if chunk_tokens % TILE:
        raise ValueError(f"chunk_tokens {chunk_tokens} is not a multiple of {TILE}")
    num_chunks = num_rows * -(-max_tokens // chunk_tokens)
    return DecodePlan(num_chunks, _stages(num_chunks * kv_heads, chunk_tokens, num_sms), chunk_tokens=chunk_tokens)


def _stages(programs: int, chunk_tokens: int, num_sms: int) -> int:
    """The deepest pipeline that a chunk can fill, and with which all programs of a multiprocessor fit on it."""
    return min(1 + 2 * (chunk_tokens // TILE), {1: 7, 2: 5}.get(-(-programs // num_sms), 3))
