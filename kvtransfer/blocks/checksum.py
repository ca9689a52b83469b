"""The digests of KV blocks, 16 bytes each: xxh3-128 over the sums of their units, in order.

The sum of a unit is the xxh3-128 of its bytes ("xxh3"), or a checksum that a GPU makes at full speed ("sum64"). So a
digest of any units can be made of their sums, wherever each was made. What moves by layers between workers with stages
has the xxh3-128 of each layer of a unit in the place of that of the unit.

The checksum is 64 bits that depend on every byte and its place. Defined here once, in numpy; the kernel that computes
it on a GPU is in kernels/triton/blocks.py.

    w_i   = little-endian 64-bit word i of the unit;  lo_i, hi_i: its lower and upper half
    a_i   = ((2 i + 1) * 0x9E3779B1) mod 2**32,  b_i = ((2 i + 1) * 0x85EBCA77) mod 2**32
    sum   = sum over i of  (lo_i ^ a_i) * (hi_i ^ b_i) + w_i          mod 2**64
    check = mix(sum + number of words)                                mod 2**64

The terms are those of XXH3's accumulators (Y. Collet, xxHash, the XXH3 specification): one wide product a word, which a
GPU does at the speed of its memory. A sum of integers does not depend on the order, so any number of programs may share
a unit. mix is the finaliser of SplitMix64 (G. Steele, D. Lea, C. Flood, OOPSLA'14), so that sums that are near do not
give checksums that are near. Against accidents, not against an adversary: a key is not part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import xxhash

from baton.node.messages.store import DigestName

FACTOR_A, FACTOR_B = 0x9E3779B1, 0x85EBCA77
WORD_BYTES = 8
SUM_BYTES = 16
"""Of an xxh3-128."""
PIECE_WORDS = 1 << 14
"""Summed at a time: with what is computed from them they stay in the cache. 2 GB/s, half of it without pieces."""
_ODD = 2 * np.arange(PIECE_WORDS, dtype=np.uint32) + np.uint32(1)
_A, _B = _ODD * np.uint32(FACTOR_A), _ODD * np.uint32(FACTOR_B)  # of the first piece; numpy's integers wrap

DigestOf = Callable[[memoryview], bytes]
"""16 bytes: finds corruption, proves no identity. Lets other threads run meanwhile."""


def unit_checksums(units: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """The checksums [n] of units [n, bytes]; bytes is a multiple of 8."""
    return checksums_of_parts([part_sums(units)], units.shape[1])


def part_sums(parts: npt.NDArray[np.uint8], first_byte: int = 0) -> npt.NDArray[np.uint64]:
    """Sums of the terms [n] of parts [n, bytes] of units, which begin so far inside of these."""
    words = np.ascontiguousarray(parts).view("<u8")
    return np.array([_sum_of_terms(part, first_byte // WORD_BYTES) for part in words], dtype=np.uint64)


def checksums_of_parts(sums: Sequence[npt.NDArray[np.uint64]], unit_bytes: int) -> npt.NDArray[np.uint64]:
    """The checksums [n] of units of so many bytes; sums: of the terms [n] of each of their parts."""
    totals = np.stack(sums).sum(axis=0, dtype=np.uint64) + np.uint64(unit_bytes // WORD_BYTES)
    return np.array([_mix(total) for total in totals.tolist()], dtype=np.uint64)


def xxh3(block: memoryview, num_units: int = 1) -> bytes:
    """The digest of a block of so many equal units, of which each is summed up by xxh3-128."""
    return digest_of_sums([xxh3_sums(block, num_units)])


def xxh3_sums(block: memoryview, num_units: int) -> bytes:
    """The xxh3-128 of each of its units."""
    unit_bytes = len(block) // num_units
    starts = range(0, len(block), unit_bytes)
    return b"".join([xxhash.xxh3_128_digest(block[start : start + unit_bytes]) for start in starts])


def sum64(block: memoryview, num_units: int = 1) -> bytes:
    """The digest of a block of so many equal units, of which each is summed up by the checksum, little-endian."""
    checks = unit_checksums(np.frombuffer(block, dtype=np.uint8).reshape(num_units, -1))
    return digest_of_sums([checks.astype("<u8").tobytes()])


def digest_of_sums(sums: Iterable[bytes]) -> bytes:
    """The digest of units of which these are the sums, in order; an item may hold the sums of several units."""
    return xxhash.xxh3_128_digest(b"".join(sums))


def digest_by(name: DigestName, num_units: int) -> DigestOf:
    """The digest called `name`, of blocks of so many units."""
    return partial({"xxh3": xxh3, "sum64": sum64}[name], num_units=num_units)


def _sum_of_terms(words: npt.NDArray[np.uint64], first: int) -> int:
    """Of words [n], of which the first has this number in its unit; modulo 2**64, piece by piece."""
    total = 0
    for start in range(0, len(words), PIECE_WORDS):
        piece, before = words[start : start + PIECE_WORDS], 2 * (first + start)
        halves = piece.view("<u4")
        low = halves[0::2] ^ (_A[: len(piece)] + np.uint32(before * FACTOR_A % (1 << 32)))
        high = halves[1::2] ^ (_B[: len(piece)] + np.uint32(before * FACTOR_B % (1 << 32)))
        total += int(np.multiply(low, high, dtype=np.uint64).sum()) + int(piece.sum())
    return total % (1 << 64)


def _mix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % (1 << 64)
    x = (x ^ x >> 27) * 0x94D049BB133111EB % (1 << 64)
    return x ^ x >> 31
