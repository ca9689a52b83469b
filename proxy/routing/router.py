"""Which workers a request goes to. Pure: a view of the cluster and a request in, a route or a reason to wait out.

The policy `kv-aware` takes the worker with the least cost in seconds:

    prefill:  (tokens waiting there + WORK_WEIGHT * tokens to compute + tokens to load, by tier) / its tokens a second
    decode:   (tokens waiting there + TRANSFER_COST * tokens whose KV would travel) / tokens a second + crowding
    local:    the first, and crowding, for a decode worker that computes the prompt itself

With `--local-prefill auto` the decode worker computes the prompt itself where that is worth it. What it computes beside
decoding holds up the requests that it has, so the first token must come sooner by more than they lose, weighted:

    (tokens waiting + to load + to compute, at prefill) - (the same, at decode) > weight * requests * (to compute)

An idle decode worker prefills as soon as a request waits, a busy one only when prefill is far behind, and long prompts
stay away from workers with many answers. Requests whose prompts are on their way count as answers.

An adapter that is in no slot of a worker is loaded there first: its seconds are a part of each of these costs. Equal
workers are distinguished by the adapter, so that requests of one settle on few of them.

A request whose answer has a grammar goes to a pair of workers with equal versions of the library that makes its masks:
others may draw different tokens for one seed, and refuse each other's.

A pair of workers between which a transfer failed lately is avoided: another decode worker or another prefill worker
takes the prompt, or the decode worker computes it. A request whose own transfer failed is computed by its decode worker
unless `--local-prefill never` forbids it.

A worker that holds more of the prompt than any other keeps the request unless another is cheaper by a margin: loads
are a heartbeat old, and without it a conversation would move between workers and be computed anew on each. A worker
that takes it over becomes a holder by computing it, so a hot prefix spreads only as far as its load asks for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from baton.proxy.routing.adapter_places import NO_ADAPTERS, AdapterPlaces, RequestAdapter, affinity, lacking
from baton.proxy.routing.kvindex import Hit

WORK_WEIGHT = 2.0
"""A token to compute delays not only this request but also those that follow it to that worker."""
SWITCH_GAIN = 0.25
"""The margin: this part of the holder's cost ..."""
SWITCH_WORTH = 2.0
"""... but at most this many times what its blocks save, so that one common block leads no request into a queue."""
EQUAL_PART = 0.05
"""Costs that differ by less are equal."""
RAM_COST = 0.25
DISK_COST = 0.75
"""Loading a token's KV from a tier, in units of computing it (Dynamo's router credits 0.75 and 0.25 of a hit)."""
TRANSFER_COST = 0.1
"""Moving a token's KV to decode, in the same units: 8B at 50 GB/s against 44,000 tokens a second."""
CROWDING_S = 0.15
"""times k / (1 - k), where k is the part of rows or blocks in use: the form of SMG's choice of a decode worker."""


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
    tokens_s: float
    """Prompt tokens that it computes in a second; that of its peers unless it is measured to differ much."""
    grammar: str = ""
    """Library and version that make its masks; empty: it takes no request with a grammar."""
    adapters: AdapterPlaces = NO_ADAPTERS


@dataclass(frozen=True, slots=True)
class RequestView:
    """A request as the router sees it. `avoid`: workers that just refused or failed it."""

    num_tokens: int
    num_blocks: int
    turn: int
    """Counts requests, for round robin."""
    avoid: frozenset[str] = frozenset()
    block_tokens: int = 1
    hashes: tuple[bytes, ...] = ()
    """Of the blocks that a cache may have: all but that of the last token, which must be computed."""
    session: bytes = b""
    """Digest of the client's key for a conversation or a user; empty: it gave none."""
    hits: Mapping[str, Hit] = field(default_factory=dict)
    """What workers have of `hashes`, by identity."""

    transfer_failed: bool = False
    """Its last attempt ended because the KV did not come from prefill to decode."""
    failed_pairs: frozenset[tuple[str, str]] = frozenset()
    """Prefill and decode workers between which transfers failed lately."""
    constrained: bool = False
    """Its answer has a grammar."""
    adapter: RequestAdapter | None = None

    def fits(self, prefill: WorkerView, decode: WorkerView) -> bool:
        """Whether the two may share the request."""
        return not self.constrained or prefill.grammar == decode.grammar

    def joins(self, prefill: WorkerView, decode: WorkerView) -> bool:
        """Whether transfers between the two are not known to fail."""
        return self.fits(prefill, decode) and (prefill.identity, decode.identity) not in self.failed_pairs

    def adapter_s(self, worker: WorkerView) -> float:
        """Until the worker can compute with the request's adapter."""
        return 0.0 if self.adapter is None else worker.adapters.load_s(self.adapter)

    def hit_tokens(self, worker: str) -> int:
        hit = self.hits.get(worker)
        return hit.blocks * self.block_tokens if hit is not None else 0


@dataclass(frozen=True, slots=True)
class RoutingRules:
    """The options of the proxy by these names, as `pick` uses them."""

    policy: str
    local_prefill: str
    """Which prompts decode workers compute themselves: never, short, auto or always."""
    local_prefill_tokens: int
    """A prompt is short if fewer of its tokens are not cached on the decode worker."""
    local_prefill_itl_weight: float
    """With auto: of a delay of running answers, against that of the first token."""


@dataclass(frozen=True, slots=True)
class Route:
    """`prefill` is None where the decode worker computes the prompt itself."""

    decode: WorkerView
    prefill: WorkerView | None
    reason: str
    decode_reason: str = ""
    prefill_reason: str = ""
    """Why this worker of the role, one of CHOICE_REASONS; "" where there was no choice to make."""
    hit_tokens: int = 0
    """Tokens that the worker that computes the prompt is expected to find in a cache."""
    contended: bool = False
    """Other tenants are active."""

    @property
    def computes(self) -> WorkerView:
        """The worker that computes the prompt."""
        return self.prefill if self.prefill is not None else self.decode


@dataclass(frozen=True, slots=True)
class Wait:
    """No worker can take the request now. `missing` names a role that has no worker at all; `in_vain`: those that are
    there never will."""

    reason: str
    missing: str = ""
    in_vain: bool = False


CHOICE_REASONS: Mapping[str, str] = {
    "holder": "it holds most of the prompt",
    "coming": "most of the prompt will be there: a sibling is on its way to it",
    "cheaper": "another holds more, but would take longer",
    "no_holder": "no worker holds any of it, and it has the least to do",
    "least_loaded": "it has the least to do",
    "turn": "it was its turn",
    "session": "the client's key leads to it",
}
"""Reasons for a choice, as they are counted and logged."""


def pick(view: Sequence[WorkerView], request: RequestView, rules: RoutingRules) -> Route | Wait:
    """The route of one request. Workers in `avoid`, and failed pairs, are taken only if there is no other way."""
    decodes = _candidates(view, "decode", request)
    prefills = _candidates(view, "prefill", request)
    if not decodes:
        return Wait("no decode worker is there", missing="decode")
    if request.adapter is not None:
        adapter = request.adapter
        places = [each.adapters for each in decodes]
        decodes = [each for each in decodes if each.adapters.take(adapter)]
        prefills = [each for each in prefills if each.adapters.take(adapter)]
        if not decodes:
            return Wait(lacking("decode", adapter, places), in_vain=True)
    must_be_local = rules.local_prefill == "always" or (rules.local_prefill != "never" and not prefills)
    if not must_be_local and not prefills:
        return Wait("no prefill worker is there", missing="prefill")
    if request.constrained:
        decodes = [each for each in decodes if _takes_grammars(each, prefills, rules)]
        if not decodes:
            return Wait(_mismatch(view), in_vain=True)
    roomy = [worker for worker in decodes if _has_room(worker, request)]
    if not roomy:
        return Wait("all decode workers are full")
    if (request.failed_pairs or request.constrained) and not must_be_local:
        roomy = [worker for worker in roomy if any(request.joins(each, worker) for each in prefills)] or roomy
    choose = _POLICIES[rules.policy]
    decode, decode_reason = choose(roomy, request, _local_cost if must_be_local else _decode_cost)
    local = Route(decode, None, "", decode_reason, "", request.hit_tokens(decode.identity))
    if must_be_local:
        return replace(local, reason="local_always" if rules.local_prefill == "always" else "local_no_prefill_worker")
    prefills = [worker for worker in prefills if request.fits(worker, decode)]
    if not prefills:
        return replace(local, reason="local_no_prefill_worker")
    joined = [worker for worker in prefills if request.joins(worker, decode)]
    if rules.local_prefill != "never" and (request.transfer_failed or not joined):
        return replace(local, reason="local_transfer_failed")
    prefill, prefill_reason = choose(joined or prefills, request, _prefill_cost)
    if reason := _local_reason(decode, prefill, request, rules):
        return replace(local, reason=reason)
    hit_tokens = request.hit_tokens(prefill.identity)
    return Route(decode, prefill, "disaggregated", decode_reason, prefill_reason, hit_tokens)


def _local_reason(decode: WorkerView, prefill: WorkerView, request: RequestView, rules: RoutingRules) -> str:
    """The reason for prefilling on the decode worker although this one could, or ""."""
    uncached = request.num_tokens - request.hit_tokens(decode.identity)
    if rules.local_prefill != "never" and uncached < rules.local_prefill_tokens:
        return "local_short"
    sooner_s = _first_token_s(prefill, request) - _first_token_s(decode, request)
    delay_s = decode.requests * uncached / decode.tokens_s
    if rules.local_prefill == "auto" and sooner_s > rules.local_prefill_itl_weight * delay_s:
        return "local_sooner"
    return ""


def _candidates(view: Sequence[WorkerView], role: str, request: RequestView) -> list[WorkerView]:
    able = [worker for worker in view if worker.role == role and not worker.draining]
    if not request.avoid:
        return able
    return [worker for worker in able if worker.identity not in request.avoid] or able


def _takes_grammars(decode: WorkerView, prefills: Sequence[WorkerView], rules: RoutingRules) -> bool:
    """Whether it can answer with a grammar: by itself, or behind a prefill worker of its version."""
    alone = rules.local_prefill != "never"
    return bool(decode.grammar) and (alone or any(each.grammar == decode.grammar for each in prefills))


def _mismatch(view: Sequence[WorkerView]) -> str:
    versions = sorted({f"{worker.role} {worker.grammar or 'none'}" for worker in view})
    return f"no workers share a version of the library for structured output: {', '.join(versions)}"


def _has_room(worker: WorkerView, request: RequestView) -> bool:
    """A request that would never fit still goes to an empty worker, which refuses it with its reason."""
    if worker.requests == 0:
        return True
    return worker.requests < worker.max_num_seqs and request.num_blocks <= worker.free_blocks


# ---- costs --------------------------------------------------------------------------------------------------------

Cost = Callable[[WorkerView, RequestView, Hit | None], float]
"""Seconds, not all of them this request's own."""


def _prefill_cost(worker: WorkerView, request: RequestView, hit: Hit | None) -> float:
    work = WORK_WEIGHT * request.num_tokens
    if hit is not None:
        work -= request.block_tokens * (WORK_WEIGHT * hit.blocks - RAM_COST * hit.ram - DISK_COST * hit.disk)
    return (worker.tokens + work) / worker.tokens_s + request.adapter_s(worker)


def _decode_cost(worker: WorkerView, request: RequestView, hit: Hit | None) -> float:
    travelling = request.num_tokens - (hit.gpu * request.block_tokens if hit is not None else 0)
    return (
        (worker.tokens + TRANSFER_COST * travelling) / worker.tokens_s + _crowding(worker) + request.adapter_s(worker)
    )


def _local_cost(worker: WorkerView, request: RequestView, hit: Hit | None) -> float:
    return _prefill_cost(worker, request, hit) + _crowding(worker)


def _first_token_s(worker: WorkerView, request: RequestView) -> float:
    """Until the worker would have loaded and computed the prompt, behind all that waits there."""
    work = float(request.num_tokens - request.hit_tokens(worker.identity))
    if (hit := request.hits.get(worker.identity)) is not None:
        work += request.block_tokens * (RAM_COST * hit.ram + DISK_COST * hit.disk)
    return (worker.tokens + work) / worker.tokens_s + request.adapter_s(worker)


def _crowding(worker: WorkerView) -> float:
    rows = worker.requests / worker.max_num_seqs
    blocks = 1.0 - worker.free_blocks / worker.total_blocks if worker.total_blocks else 0.0
    used = min(max(rows, blocks), 0.99)
    return CROWDING_S * used / (1.0 - used)


# ---- policies -----------------------------------------------------------------------------------------------------

Choice = tuple[WorkerView, str]


def _kv_aware(workers: Sequence[WorkerView], request: RequestView, cost: Cost) -> Choice:
    hits = [request.hits.get(worker.identity) for worker in workers]
    costs = [cost(worker, request, hit) for worker, hit in zip(workers, hits, strict=True)]
    least = min(costs)
    equals = [place for place, each in enumerate(costs) if each * (1.0 - EQUAL_PART) <= least]
    depths = [0 if hit is None else hit.gpu + hit.coming + hit.ram + hit.disk for hit in hits]
    deepest = max(depths)
    best = _deepest(equals, depths, workers, request)
    if not deepest:
        return workers[best], "no_holder"
    if depths[best] < deepest:
        held_cost, holder = min((each, place) for place, each in enumerate(costs) if depths[place] == deepest)
        saved = cost(workers[holder], request, hits[best]) - held_cost
        if held_cost - min(SWITCH_GAIN * held_cost, SWITCH_WORTH * saved) > least:
            return workers[best], "cheaper"
        best = holder
    hit = hits[best]
    return workers[best], "coming" if hit is not None and 2 * hit.coming > hit.blocks else "holder"


def _deepest(places: Sequence[int], depths: Sequence[int], workers: Sequence[WorkerView], request: RequestView) -> int:
    """Of workers that cost about the same, one that holds most; equals take turns, so that all pools are used. Those of
    one adapter go to the same, so that few workers load it."""
    most = max(depths[place] for place in places)
    found = [place for place in places if depths[place] == most]
    if (adapter := request.adapter) is not None:
        return max(found, key=lambda place: affinity(adapter, workers[place].identity))
    return found[request.turn % len(found)]


def _least_loaded(workers: Sequence[WorkerView], request: RequestView, cost: Cost) -> Choice:
    """Fewest tokens to compute, then fewest requests, then most free blocks; equals take turns."""
    key = min((w.tokens, w.requests, -w.free_blocks) for w in workers)
    equals = [w for w in workers if (w.tokens, w.requests, -w.free_blocks) == key]
    return _in_turn(equals, request.turn), "least_loaded"


def _round_robin(workers: Sequence[WorkerView], request: RequestView, cost: Cost) -> Choice:
    return _in_turn(workers, request.turn), "turn"


def _session(workers: Sequence[WorkerView], request: RequestView, cost: Cost) -> Choice:
    """The worker that comes first for the client's key (rendezvous hashing: when one leaves, only its own move)."""
    if not request.session:
        return _least_loaded(workers, request, cost)
    return max(workers, key=lambda worker: _weight(worker, request.session)), "session"


def _weight(worker: WorkerView, session: bytes) -> bytes:
    """Of a worker without its incarnation: one that comes back gets back its sessions."""
    name = worker.identity.rpartition("/")[0]
    return hashlib.blake2b(session + name.encode(), digest_size=8).digest()


def _in_turn(workers: Sequence[WorkerView], turn: int) -> WorkerView:
    return workers[turn % len(workers)]


_POLICIES: Mapping[str, Callable[[Sequence[WorkerView], RequestView, Cost], Choice]] = {
    "kv-aware": _kv_aware,
    "least-loaded": _least_loaded,
    "round-robin": _round_robin,
    "session": _session,
}
POLICIES = tuple(_POLICIES)
