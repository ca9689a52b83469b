"""Which workers a request goes to. Pure: a view of the cluster and a request in, a route or a reason to wait out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A live worker at one moment. Its own report and what was sent to it since are added up already."""

    identity: str
    address: str
    role: str
    draining: bool
    requests: int
    """In work, queued there, or on the way."""
    tokens: int
    """Not computed yet."""
    free_blocks: int
    total_blocks: int
    max_num_seqs: int


@dataclass(frozen=True, slots=True)
class RequestView:
    """What routing needs to know of a request. `avoid`: workers that just refused or failed it."""

    num_tokens: int
    num_blocks: int
    turn: int
    """Counts requests, for round robin."""
    avoid: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Rules:
    policy: str
    local_prefill: str
    local_prefill_tokens: int


@dataclass(frozen=True, slots=True)
class Route:
    """`prefill` is None where the decode worker computes the prompt itself."""

    decode: WorkerView
    prefill: WorkerView | None
    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Nobody can take the request now. `missing` names a role of which there is no worker at all."""

    reason: str
    missing: str = ""


def pick(view: Sequence[WorkerView], request: RequestView, rules: Rules) -> Route | Wait:
    """The route of one request. Workers in `avoid` are taken only if there is no other."""
    decodes = _candidates(view, "decode", request)
    prefills = _candidates(view, "prefill", request)
    if not decodes:
        return Wait("no decode worker is there", missing="decode")
    reason = _why_local(bool(prefills), request, rules)
    if not reason and not prefills:
        return Wait("no prefill worker is there", missing="prefill")
    roomy = [worker for worker in decodes if _has_room(worker, request)]
    if not roomy:
        return Wait("all decode workers are full")
    choose = _CHOICES[rules.policy]
    decode = choose(roomy, request.turn)
    return Route(decode, None, reason) if reason else Route(decode, choose(prefills, request.turn), "disaggregated")


def _why_local(prefills: bool, request: RequestView, rules: Rules) -> str:
    """The reason for prefilling on the decode worker, or "" for a prefill worker."""
    if rules.local_prefill == "always":
        return "local_always"
    if rules.local_prefill == "short" and request.num_tokens < rules.local_prefill_tokens:
        return "local_short"
    if rules.local_prefill == "short" and not prefills:
        return "local_no_prefill_worker"
    return ""


def _candidates(view: Sequence[WorkerView], role: str, request: RequestView) -> list[WorkerView]:
    able = [worker for worker in view if worker.role == role and not worker.draining]
    return [worker for worker in able if worker.identity not in request.avoid] or able


def _has_room(worker: WorkerView, request: RequestView) -> bool:
    """A request that would never fit still goes to an empty worker, which refuses it with its reason."""
    if worker.requests == 0:
        return True
    return worker.requests < worker.max_num_seqs and request.num_blocks <= worker.free_blocks


def _least_loaded(workers: Sequence[WorkerView], turn: int) -> WorkerView:
    """Fewest tokens to compute, then fewest requests, then most free blocks; equals take turns."""
    key = min((w.tokens, w.requests, -w.free_blocks) for w in workers)
    equals = [w for w in workers if (w.tokens, w.requests, -w.free_blocks) == key]
    return equals[turn % len(equals)]


def _round_robin(workers: Sequence[WorkerView], turn: int) -> WorkerView:
    return workers[turn % len(workers)]


_CHOICES: dict[str, Callable[[Sequence[WorkerView], int], WorkerView]] = {
    "least-loaded": _least_loaded,
    "round-robin": _round_robin,
}
