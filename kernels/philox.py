"""Philox4x32-10: random bits as a pure function of a key and a counter, so that a draw can be repeated anywhere.

J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw: Parallel Random Numbers: As Easy as 1, 2, 3, SC'11. The bits for one
token are defined here once and must come out the same of every implementation:

    key     = (seed & 0xffffffff, seed >> 32)
    counter = (token_id // 4, position, 0, 0)          position: index that the new token gets in its sequence
    x       = output word token_id % 4                 a 32-bit unsigned integer
    u       = min(float32(x) * 2**-32 + 2**-33, 1 - 2**-24)

All of it in float32, round to nearest even; the product is exact, so a fused multiply-add gives the same u. u lies in
[2**-33, 1 - 2**-24] and is fine where it is small, which is where -log(1 - u) needs it to be.
"""

from __future__ import annotations

import torch

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_ROUNDS = 10


def philox4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    key: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four 32-bit words for each counter; all tensors int64 with values below 2**32, of shapes that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product of two 32-bit numbers wraps around int64 into the sign, but its 64 bits are right.
        product0, product1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def uniform(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """u for every row and token, float32 [rows, vocab_size]; seeds (below 2**63) and positions int64 [rows]."""
    seeds, positions = seeds[:, None], positions[:, None]
    lanes = torch.arange((vocab_size + 3) // 4, device=seeds.device)[None, :]
    zero = torch.zeros_like(positions)
    words = philox4x32((lanes, positions, zero, zero), (seeds & _MASK, (seeds >> 32) & _MASK))
    bits = torch.stack(words, dim=-1).flatten(1)[:, :vocab_size]
    return (bits.to(torch.float32) * 2.0**-32 + 2.0**-33).clamp_(max=1 - 2.0**-24)
