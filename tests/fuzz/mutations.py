"""A seeded loop that feeds a decoder with damaged copies of valid inputs, and some noise.

hypothesis makes the structured inputs elsewhere (tests/unit/node/test_messages.py and beside each decoder); it takes a
millisecond for each, which is too slow for 10^5 of them in CI. A failure names the seed and the input. The time of one
input is bounded by the timeout of the test, its memory by RLIMIT-like accounting at the end: the largest resident size
of the process may grow by MAX_GROWTH_KIB.
"""

from __future__ import annotations

import random
import resource
from collections.abc import Callable, Iterator, Sequence

SEED = 20_251
MAX_GROWTH_KIB = 256 << 10
ODD_BYTES = (
    *(b"", b"\x00", b"\xff", b"\x7f", b"\x80", b"\xc0", b"\xc1", b"\xc7\x05", b"\xdf\xff\xff\xff\xff"),
    *(b"\xcf" + b"\xff" * 8, b"\xd3\x80" + b"\x00" * 7, b"\xcb\x7f\xf8" + b"\x00" * 6, b"\x91" * 200, b"\xed\xa0\x80"),
    *(b"[", b"]", b"{", b"}", b'"', b",", b":", b"-", b"e999", b"null", b"NaN", b"1e400", b"9" * 30, b"[" * 300),
    *(b"\\ud800", b"\r\n", b"\n\n", b"\x1b[31m", b"../", b"data: ", b"true", b"-1", b'""', b"{}", b"\xe2\x80\xa8"),
)


def mutations(samples: Sequence[bytes], count: int, seed: int = SEED) -> Iterator[bytes]:
    """Nine in ten inputs are a sample with one to four changes, the others are random bytes."""
    chance = random.Random(seed)
    for _ in range(count):
        if chance.random() < 0.1:
            yield chance.randbytes(chance.choice((0, 1, 8, 64, 300)))
            continue
        damaged = bytearray(chance.choice(samples))
        for _ in range(chance.randrange(1, 5)):
            _change(chance, damaged, samples)
        yield bytes(damaged)


def _change(chance: random.Random, damaged: bytearray, samples: Sequence[bytes]) -> None:
    at = chance.randrange(len(damaged) + 1)
    end = min(len(damaged), at + chance.choice((0, 1, 2, 8, 50)))
    kind = chance.randrange(6)
    if kind == 0 and at < len(damaged):
        damaged[at] ^= 1 << chance.randrange(8)
    elif kind == 1:
        damaged[at:end] = chance.choice(ODD_BYTES)
    elif kind == 2:
        damaged[at:end] = damaged[at:end] * chance.choice((0, 2, 20))
    elif kind == 3:
        del damaged[at:]
    elif kind == 4:
        other = chance.choice(samples)
        start = chance.randrange(len(other) + 1)
        damaged[at:end] = other[start : start + chance.choice((1, 4, 30))]
    else:
        damaged[at:end] = chance.randbytes(end - at)


def feed(
    samples: Sequence[bytes],
    count: int,
    accept: Callable[[bytes], object],
    expected: type[Exception] | tuple[type[Exception], ...],
    seed: int = SEED,
) -> int:
    """Call `accept` with `count` mutations; how many raised `expected`. Any other exception fails with its input."""
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for number, data in enumerate(mutations(samples, count, seed)):
        try:
            accept(data)
        except expected:
            refused += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise AssertionError(f"seed {seed}, input {number}: {data[:2000]!r} raised {error!r}") from error
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert grown_kib < MAX_GROWTH_KIB, f"seed {seed}: memory has grown by {grown_kib} KiB"
    assert 0 < refused < count, "the samples, or their changes, are useless"
    return refused
