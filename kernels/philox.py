"""Philox4x32-10: random bits as a pure function of a key and a counter, so that a draw can be repeated anywhere.

J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw: Parallel Random Numbers: As Easy as 1, 2, 3, SC'11. The number for
one token is defined here once and must come out the same of every implementation:

    key     = (seed & 0xffffffff, seed >> 32)
    counter = (token_id // 4, position, 0, 0)          position: index that the new token gets in its sequence
    x       = output word token_id % 4                 a 32-bit unsigned integer
    u       = min(float32(x) * 2**-32 + 2**-33, 1 - 2**-24)

All of it in float32, round to nearest even; the product is exact, so a fused multiply-add gives the same u. u lies in
[2**-33, 1 - 2**-24] and is fine where it is small, which is where -log(1 - u) needs it to be.

In numpy, because torch has no unsigned 64-bit product on the CPU and emulating one costs three times as much.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

Words = npt.NDArray[np.uint64]

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_ROUNDS = 10


def philox4x32(counter: tuple[Words, ...], key: tuple[Words, Words]) -> tuple[Words, ...]:
    """Four 32-bit words for each counter of four; uint64 arrays with values below 2**32, of shapes that broadcast."""
    c0, c1, c2, c3 = counter
    for round_number in range(_ROUNDS):
        k0 = (key[0] + np.uint64(round_number * _W0)) & _MASK
        k1 = (key[1] + np.uint64(round_number * _W1)) & _MASK
        product0, product1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            (product1 >> _HALF) ^ c1 ^ k0,
            product1 & _MASK,
            (product0 >> _HALF) ^ c3 ^ k1,
            product0 & _MASK,
        )
    return c0, c1, c2, c3


def uniform(seeds: torch.Tensor, positions: torch.Tensor, num_tokens: int, first_token: int = 0) -> torch.Tensor:
    """u of every row and of so many tokens from the first on, float32 [rows, num_tokens]; seeds (below 2**63) and
    positions int64 [rows]."""
    end_token, skipped = first_token + num_tokens, first_token % 4
    lanes = np.arange(first_token // 4, (end_token + 3) // 4, dtype=np.uint64)[None, :]
    words = _words(lanes, seeds, positions)
    return _to_uniform(np.stack(words, axis=-1).reshape(len(seeds), -1)[:, skipped : skipped + num_tokens])


def uniform_of(seeds: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """u of some tokens of each row, float32 [rows, n]; token_ids int64 [rows, n]. Equals `uniform` at these tokens."""
    ids = token_ids.numpy().astype(np.uint64)
    words = _words(ids >> np.uint64(2), seeds, positions)
    return _to_uniform(np.choose((ids & np.uint64(3)).astype(np.intp), words))


def _words(lanes: Words, seeds: torch.Tensor, positions: torch.Tensor) -> tuple[Words, ...]:
    key = seeds.numpy().astype(np.uint64)[:, None]
    place = positions.numpy().astype(np.uint64)[:, None]
    zero = np.zeros_like(place)
    return philox4x32((lanes, place, zero, zero), (key & _MASK, key >> _HALF))


def _to_uniform(bits: Words) -> torch.Tensor:
    u = bits.astype(np.uint32).astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    return torch.from_numpy(np.minimum(u, np.float32(1 - 2.0**-24)))
