"""In which order the revisions of a deployment are asked to take a request. Pure.

While one revision replaces another, both have workers, and the two workers of a request are of one of them. Requests go
where fewer are for each row of decode workers, so each revision gets its part as its workers come and go. A revision
whose caches have the prompt may be more loaded by HOLDER_WORTH.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.proxy.routing.model_workers import Revision
from baton.proxy.routing.router import RequestView

HOLDER_WORTH = 0.25
"""What a whole prompt in a cache is worth, in parts of the rows."""


@dataclass(frozen=True, slots=True)
class RevisionOffer:
    """A request as the router sees it in a revision."""

    revision: Revision
    request: RequestView


def in_order(offers: Sequence[RevisionOffer]) -> list[RevisionOffer]:
    """The one that is loaded least comes first; equals take turns."""
    if len(offers) < 2:
        return list(offers)
    begin = offers[0].request.turn % len(offers)
    return sorted([*offers[begin:], *offers[:begin]], key=_load)


def _load(offer: RevisionOffer) -> float:
    decodes = [worker for worker in offer.revision.workers if worker.role != "prefill" and not worker.draining]
    rows = sum(worker.max_num_seqs for worker in decodes)
    if not rows:
        return float("inf")
    request = offer.request
    held = max(request.hit_tokens(worker.identity) for worker in offer.revision.workers) / request.num_tokens
    return (1 + sum(worker.requests for worker in decodes)) / rows - HOLDER_WORTH * held
