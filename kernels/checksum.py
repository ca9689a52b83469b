"""The checksum of a KV block: 64 bits that depend on every byte and its place. Defined here once, in numpy.

    w_i   = little-endian 64-bit word i of the block;  lo_i, hi_i: its lower and upper half
    a_i   = ((2 i + 1) * 0x9E3779B1) mod 2**32,  b_i = ((2 i + 1) * 0x85EBCA77) mod 2**32
    sum   = sum over i of  (lo_i ^ a_i) * (hi_i ^ b_i) + w_i          mod 2**64
    check = mix(sum + number of words)                                mod 2**64

The terms are those of XXH3's accumulators (Y. Collet, xxHash, the XXH3 specification): one wide product a word, which a
GPU does at the speed of its memory. A sum of integers does not depend on the order, so any number of programs may share
a block. mix is the finaliser of SplitMix64 (G. Steele, D. Lea, C. Flood, OOPSLA'14), so that sums that are near do not
give checksums that are near. Against accidents, not against an adversary: a key is not part of it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FACTOR_A, FACTOR_B = 0x9E3779B1, 0x85EBCA77
WORD_BYTES = 8


def block_checksums(blocks: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """The checksums [n] of blocks [n, bytes]; bytes is a multiple of 8."""
    words = np.ascontiguousarray(blocks).view("<u8")
    odd = 2 * np.arange(words.shape[1], dtype=np.uint64) + np.uint64(1)
    low_mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a, b = odd * np.uint64(FACTOR_A) & low_mask, odd * np.uint64(FACTOR_B) & low_mask
    terms = ((words & low_mask) ^ a) * ((words >> half) ^ b) + words
    return _mix(terms.sum(axis=1, dtype=np.uint64) + np.uint64(words.shape[1]))


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
