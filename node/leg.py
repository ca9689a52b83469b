"""The name of one attempt of a request, by which proxy and workers match messages, transfers and store lookups."""

from __future__ import annotations

from typing import NamedTuple


class LegKey(NamedTuple):
    """One attempt of one request on one worker; it has at most one transfer and one store lookup at a time."""

    request_id: str
    attempt: int
