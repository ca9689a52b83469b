"""kvtransfer.blocks.checksum: the checksum of a unit, and the digests of blocks."""

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from baton.kvtransfer.blocks.checksum import (
    FACTOR_A,
    FACTOR_B,
    PIECE_WORDS,
    checksums_of_parts,
    digest_by,
    part_sums,
    unit_checksums,
)


def as_block(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype=np.uint8)[None]


def test_the_definition_word_by_word():
    """Guards against a change of the definition: both ends of a transfer must agree across versions."""
    words = [0, 1, 0xFFFFFFFF00000001, 0x0123456789ABCDEF]
    total = 0
    for index, word in enumerate(words):
        a, b = ((2 * index + 1) * factor % 2**32 for factor in (0x9E3779B1, 0x85EBCA77))
        total += ((word % 2**32) ^ a) * ((word >> 32) ^ b) + word
    x = (total + len(words)) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    data = b"".join(word.to_bytes(8, "little") for word in words)
    assert int(unit_checksums(as_block(data))[0]) == x ^ (x >> 31)


@given(st.binary(min_size=64, max_size=64), st.integers(0, 511))
def test_every_flipped_bit_is_seen(data, bit):
    """Guards against words or bits that the sum leaves out."""
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    assert unit_checksums(as_block(data)) != unit_checksums(as_block(bytes(flipped)))


@pytest.mark.parametrize("unit", [8, 16, 64, 512])
def test_exchanged_and_missing_pieces_are_seen(unit):
    """Guards against a sum that ignores positions: pieces swapped, shifted, repeated or all zero."""
    data = np.random.default_rng(0).integers(0, 256, 2048, dtype=np.uint8)
    pieces = data.reshape(-1, unit)
    swapped, repeated, zeroed = pieces.copy(), pieces.copy(), pieces.copy()
    swapped[[0, 1]] = pieces[[1, 0]]
    repeated[1] = pieces[0]
    zeroed[2] = 0
    variants = [data, swapped, repeated, zeroed, np.roll(pieces, 1, axis=0), np.zeros(2048, np.uint8)]
    checks = {int(unit_checksums(variant.reshape(1, -1))[0]) for variant in variants}
    assert len(checks) == len(variants)


@pytest.mark.parametrize("words", [1, PIECE_WORDS - 1, PIECE_WORDS, 2 * PIECE_WORDS + 3])
def test_pieces_make_no_difference(words):
    """Guards summation in pieces: terms depend on the position in the block, not in the piece."""
    data = np.random.default_rng(words).integers(0, 1 << 64, (2, words), dtype=np.uint64)
    for block in data:
        total = words
        for index, word in enumerate(map(int, block)):
            a, b = ((2 * index + 1) * factor % 2**32 for factor in (FACTOR_A, FACTOR_B))
            total += ((word % 2**32) ^ a) * ((word >> 32) ^ b) + word
        x = total % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        assert int(unit_checksums(block[None].view(np.uint8))[0]) == x ^ x >> 31


@pytest.mark.parametrize("at", [1, 7, PIECE_WORDS + 5, 2 * PIECE_WORDS + 2])
def test_checksums_of_parts_are_those_of_the_whole(at):
    """Guards against parts that are summed up as if each were the first of its unit."""
    units = np.random.default_rng(at).integers(0, 256, (3, 8 * (2 * PIECE_WORDS + 3)), dtype=np.uint8)
    parts = [part_sums(units[:, : 8 * at]), part_sums(units[:, 8 * at :], 8 * at)]
    assert checksums_of_parts(parts, units.shape[1]).tolist() == unit_checksums(units).tolist()


def test_each_digest_name_has_a_fixed_definition():
    """Guards the digest names that stores and workers exchange, which must never change their meaning."""
    block, units = memoryview(bytes(range(256))), [bytes(range(64 * i, 64 * i + 64)) for i in range(4)]
    sums = b"".join(map(xxhash.xxh3_128_digest, units))
    assert digest_by("xxh3", 4)(block) == xxhash.xxh3_128_digest(sums)
    checks = [int(unit_checksums(as_block(unit))[0]).to_bytes(8, "little") for unit in units]
    assert digest_by("sum64", 4)(block) == xxhash.xxh3_128_digest(b"".join(checks))
    assert len({digest_by(name, count)(block) for name in ("xxh3", "sum64") for count in (1, 2, 4)}) == 6
