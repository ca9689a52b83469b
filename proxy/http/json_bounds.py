"""How much structure the JSON of a body may have, counted before it is parsed.

A parser holds the interpreter until it is done, so a thread for it would not keep the event loop free: its work is
bounded instead. Text costs nothing of it: what is inside strings does not count, so a prompt may be as long as a body.
The bounds are such that the dearest body of each kind takes about a tenth of a second. Knows no fields.
"""

from __future__ import annotations

from baton.node.errors import BadRequest
from baton.node.messages.base import MAX_TOKENS

FREE_BYTES = 16 << 10
"""Whatever a body of this size holds takes milliseconds."""
MAX_ARRAYS = 1 << 16
"""Arrays and objects together: up to 2 us each. A conversation of 10,000 messages of two parts each has 40,000."""
MAX_STRINGS = 1 << 17
"""Keys among them: up to 0.6 us each. A conversation of 10,000 messages, each a part of its own, has 80,000."""
MAX_VALUES = MAX_TOKENS + (1 << 16)
"""Up to 0.1 us each. All token ids of the longest prompt, and what else there is."""


def check_structure(*texts: bytes) -> None:
    """Raises BadRequest where all together have more than the bounds. Of what is no JSON it may count anything."""
    if sum(map(len, texts)) <= FREE_BYTES:
        return
    num_strings = num_arrays = num_values = 0
    for text in texts:
        unescaped = text.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in text else text
        num_strings += unescaped.count(b'"') // 2
        _check(num_strings, MAX_STRINGS, "strings and keys")  # before each is split off
        outside = b"".join(unescaped.split(b'"')[::2])
        num_arrays += outside.count(b"[") + outside.count(b"{")
        num_values += outside.count(b",")
    _check(num_arrays, MAX_ARRAYS, "arrays and objects")
    _check(num_values, MAX_VALUES, "values")


def _check(count: int, limit: int, what: str) -> None:
    if count > limit:
        raise BadRequest(f"invalid body: more than {limit} {what}")
