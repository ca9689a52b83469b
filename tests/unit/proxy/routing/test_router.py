"""proxy.routing.router: the right worker, the reason for each choice, and waiting instead of overloading."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.proxy.routing.kvindex import Hit
from baton.proxy.routing.router import (
    CHOICE_REASONS,
    POLICIES,
    SWITCH_GAIN,
    RequestView,
    Route,
    RoutingRules,
    Wait,
    WorkerView,
    pick,
)


def _worker(identity: str, role: str = "decode", **changes: object) -> WorkerView:
    base = WorkerView(
        identity=identity,
        address=f"tcp://{identity}",
        role=role,
        draining=False,
        requests=1,
        tokens=0,
        free_blocks=100,
        total_blocks=100,
        max_num_seqs=8,
        tokens_s=1000.0,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


RULES = RoutingRules("least-loaded", "never", 16, 0.15)
REQUEST = RequestView(num_tokens=50, num_blocks=4, turn=0)
P0, P1, D0, D1 = _worker("p0", "prefill"), _worker("p1", "prefill"), _worker("d0"), _worker("d1")


def _route(view: list[WorkerView], request: RequestView = REQUEST, rules: RoutingRules = RULES) -> Route:
    route = pick(view, request, rules)
    assert isinstance(route, Route), route
    return route


def test_least_loaded_looks_at_tokens_then_requests_then_blocks() -> None:
    """Guards the order of the criteria, on both roles."""
    assert _route([replace(P0, tokens=9), P1, D0]).prefill == P1
    assert _route([P0, replace(D0, requests=3), D1]).decode == D1
    assert _route([P0, replace(D0, free_blocks=90), D1]).decode == D1


@pytest.mark.parametrize("policy", ["least-loaded", "round-robin"])
def test_equal_workers_take_turns(policy: str) -> None:
    """Guards against herding: a burst on idle workers is spread."""
    rules = RoutingRules(policy, "never", 16, 0.15)
    chosen = [_route([P0, P1, D0, D1], replace(REQUEST, turn=t), rules) for t in range(4)]
    assert [r.decode.identity for r in chosen] == ["d0", "d1", "d0", "d1"]
    assert [r.prefill and r.prefill.identity for r in chosen] == ["p0", "p1", "p0", "p1"]


@pytest.mark.parametrize(
    ("mode", "num_tokens", "prefills", "reason"),
    [
        ("never", 5, True, "disaggregated"),
        ("short", 15, True, "local_short"),
        ("short", 16, True, "disaggregated"),
        ("short", 16, False, "local_no_prefill_worker"),
        ("auto", 15, True, "local_short"),
        ("auto", 16, True, "disaggregated"),
        ("auto", 16, False, "local_no_prefill_worker"),
        ("always", 500, True, "local_always"),
    ],
)
def test_conditional_disaggregation(mode: str, num_tokens: int, prefills: bool, reason: str) -> None:
    """Guards the rule for local prefill, and that its reason is visible."""
    view = [P0, D0] if prefills else [D0]
    route = _route(view, replace(REQUEST, num_tokens=num_tokens), RoutingRules("least-loaded", mode, 16, 0.15))
    assert route.reason == reason
    assert (route.prefill is None) == reason.startswith("local")


def _auto(prefill: WorkerView, decode: WorkerView, request: RequestView = REQUEST, weight: float = 0.15) -> str:
    return _route([prefill, decode], request, RoutingRules("kv-aware", "auto", 16, weight)).reason


def test_decode_helps_out_where_that_costs_less_than_waiting() -> None:
    """Guards the bargain of `auto`: 50 tokens hold up 4 answers for 0.05 s, at 0.15 each that is 30 tokens of wait."""
    busy = replace(D0, requests=4)
    assert _auto(replace(P0, tokens=30), busy) == "disaggregated"
    assert _auto(replace(P0, tokens=31), busy) == "local_sooner"
    assert _auto(replace(P0, tokens=40), replace(busy, tokens=10)) == "disaggregated"
    assert _auto(replace(P0, tokens=31), replace(busy, requests=5)) == "disaggregated"
    assert _auto(replace(P0, tokens=31), busy, weight=0.2) == "disaggregated"
    assert _auto(replace(P0, tokens=31), busy, replace(REQUEST, num_tokens=60)) == "disaggregated"


def test_decode_helps_out_by_what_each_holds_and_how_fast_each_is() -> None:
    """Guards `auto` against counting cached tokens, and tokens of a slow worker like those of a fast one."""
    prompt = RequestView(num_tokens=1000, num_blocks=63, turn=0, block_tokens=16)
    held = replace(prompt, hits={"d0": Hit(gpu=50)})
    assert _auto(P0, D0, prompt) == "disaggregated"
    assert _auto(P0, D0, held) == "local_sooner"
    assert _auto(P0, replace(D0, max_num_seqs=99, requests=30), held) == "disaggregated"
    assert _auto(P0, D0, replace(held, hits={"d0": Hit(gpu=50), "p0": Hit(gpu=50)})) == "disaggregated"
    ten = replace(D0, max_num_seqs=99, requests=10)  # 200 tokens to compute there weigh 300
    assert _auto(P0, ten, replace(prompt, hits={"d0": Hit(gpu=50)})) == "local_sooner"  # by 800
    assert _auto(P0, ten, replace(prompt, hits={"d0": Hit(disk=50)})) == "disaggregated"  # by 200
    assert _auto(replace(P0, tokens=900), replace(D0, tokens_s=400.0), prompt) == "disaggregated"
    assert _auto(replace(P0, tokens=900), D0, prompt) == "local_sooner"


def test_missing_roles_are_named() -> None:
    """Guards the error of a cluster without a role: it says which."""
    assert pick([P0], REQUEST, RULES) == Wait("no decode worker is there", missing="decode")
    assert pick([D0], REQUEST, RULES) == Wait("no prefill worker is there", missing="prefill")
    draining = replace(D0, draining=True)
    assert isinstance(pick([P0, draining], REQUEST, RULES), Wait)


def test_a_request_with_a_grammar_gets_a_pair_of_one_version() -> None:
    """Guards masks: workers of two versions of the library draw different tokens for one seed."""
    old, new = {"grammar": "llguidance/1.8"}, {"grammar": "llguidance/1.9"}
    constrained = replace(REQUEST, constrained=True)
    view = [replace(P0, **old), replace(P1, tokens=999, **new), replace(D0, **new), replace(D1, requests=0)]
    route = _route(view, constrained)
    assert route.prefill == view[1] and route.decode == view[2]
    assert _route(view).prefill == view[0] and _route(view).decode == view[3]
    waiting = pick([view[0], view[2]], constrained, RULES)
    assert isinstance(waiting, Wait) and waiting.in_vain
    assert "decode llguidance/1.9, prefill llguidance/1.8" in waiting.reason
    local = _route([view[0], view[2]], constrained, RoutingRules("least-loaded", "auto", 16, 0.15))
    assert (local.decode, local.prefill, local.reason) == (view[2], None, "local_no_prefill_worker")
    full = pick([view[1], replace(D0, requests=8, **new), D1], constrained, RULES)
    assert isinstance(full, Wait) and not full.in_vain
    assert isinstance(pick([P0, D0], constrained, RULES), Wait)


def test_full_workers_make_it_wait() -> None:
    """Guards admission: no rows or too few blocks is a wait, not a route that bounces."""
    for full in (replace(D0, requests=8), replace(D0, free_blocks=3)):
        waiting = pick([P0, full], REQUEST, RULES)
        assert isinstance(waiting, Wait) and not waiting.missing


def test_an_idle_worker_gets_even_what_it_must_refuse() -> None:
    """Guards against an endless wait: a request larger than the pool is refused by the worker, with its reason."""
    assert _route([P0, replace(D0, requests=0, free_blocks=3)]).decode.identity == "d0"


def test_workers_that_failed_the_request_are_avoided_if_possible() -> None:
    """Guards retries: another worker if there is one, the same one rather than none."""
    request = replace(REQUEST, avoid=frozenset({"d0"}))
    assert _route([P0, D0, D1], request).decode == D1
    assert _route([P0, D0], request).decode == D0


# ---- kv-aware -----------------------------------------------------------------------------------------------------

KV = RoutingRules("kv-aware", "never", 16, 0.15)
PROMPT = RequestView(num_tokens=1000, num_blocks=63, turn=0, block_tokens=16)
PREFILLS = [_worker(f"p{number}", "prefill") for number in range(4)]


def _hits(request: RequestView = PROMPT, **blocks: int) -> RequestView:
    return replace(request, hits={worker: Hit(gpu=number) for worker, number in blocks.items()})


def _prefill(view: list[WorkerView], request: RequestView) -> tuple[str, str]:
    route = _route([*view, D0], request, KV)
    assert route.prefill is not None
    return route.prefill.identity, route.prefill_reason


def test_a_request_goes_to_the_holder_of_its_prefix() -> None:
    """Guards the point of it all, what it predicts, and that an empty cluster takes turns."""
    assert _prefill(PREFILLS, _hits(p2=40)) == ("p2", "holder")
    assert _route([*PREFILLS, D0], _hits(p2=40), KV).hit_tokens == 640
    assert [_prefill(PREFILLS, replace(PROMPT, turn=turn)) for turn in range(4)] == [
        (f"p{turn}", "no_holder") for turn in range(4)
    ]


def test_a_busy_holder_loses_it_to_an_idle_worker() -> None:
    """Guards against a hot spot: past the margin the request is computed anew elsewhere, which spreads the prefix."""
    view = [replace(PREFILLS[0], tokens=5000), *PREFILLS[1:]]
    assert _prefill(view, _hits(p0=60)) == ("p1", "cheaper")


def test_tiers_cost_what_loading_costs() -> None:
    """Guards tier-blind routing: a pool before RAM, RAM before disk, disk before computing."""
    hits = [Hit(gpu=60), Hit(ram=60), Hit(disk=60), Hit()]
    for better in range(3):
        for worse in range(better + 1, 4):
            request = replace(PROMPT, hits={"p0": hits[worse], "p1": hits[better]})
            assert _prefill(PREFILLS[:2], request)[0] == "p1", (better, worse)


def test_a_faster_worker_is_given_more() -> None:
    """Guards measured speeds: half the queue at a quarter of the speed is the longer wait."""
    slow, fast = replace(PREFILLS[0], tokens=2000, tokens_s=500.0), replace(PREFILLS[1], tokens=4000, tokens_s=2000.0)
    assert _prefill([slow, fast], PROMPT)[0] == "p1"


def test_decode_prefers_what_need_not_travel_while_rows_are_free() -> None:
    """Guards the decode stage: its own prefix hits count, and load counts more."""
    assert _route([P0, D0, D1], _hits(d1=60), KV).decode.identity == "d1"
    assert _route([P0, D0, D1], _hits(d1=60), KV).decode_reason == "holder"
    crowded = replace(D1, requests=7)
    assert _route([P0, D0, crowded], _hits(d1=60), KV).decode.identity == "d0"


@pytest.mark.parametrize("mode", ["short", "auto", "always"])
def test_decode_computes_what_it_mostly_holds(mode: str) -> None:
    """Guards conditional disaggregation: what counts is what the decode worker lacks, not the prompt's length."""
    route = _route([P0, D0, D1], _hits(d1=62), RoutingRules("kv-aware", mode, 16, 0.15))
    assert (route.decode.identity, route.prefill, route.hit_tokens) == ("d1", None, 992)
    assert route.computes.identity == "d1"


def test_siblings_go_together_until_that_takes_longer() -> None:
    """Guards bursts: what a sibling will have computed counts at once, and its queue counts too."""
    view = {worker.identity: worker for worker in PREFILLS}
    coming: set[str] = set()
    chosen: Counter[str] = Counter()
    for turn in range(120):
        request = replace(PROMPT, turn=turn, hits={worker: Hit(coming=56) for worker in sorted(coming)})
        route = _route([*view.values(), D0], request, KV)
        assert route.prefill is not None
        name = route.prefill.identity
        view[name] = replace(view[name], tokens=view[name].tokens + 1000 - route.hit_tokens)
        coming.add(name)
        chosen[name] += 1
        if turn < 10:
            assert set(chosen) == {name}, "the first ones go together: each would take longer elsewhere"
    queues = [worker.tokens for worker in view.values()]
    assert set(chosen) == set(view) and max(queues) - min(queues) < 2000 / (1 - SWITCH_GAIN)
    assert sum(queues) == 4 * 1000 + 116 * (1000 - 56 * 16), "the prefix is computed once a worker"


def test_noise_does_not_move_a_conversation_but_load_does() -> None:
    """Guards hysteresis: queues that differ by less than the margin leave it where it is, both ways."""
    home, away = PREFILLS[0], PREFILLS[1]
    held = 1000 - 40 * 16  # tokens that the holder would compute
    just_below = int(2 * 1000 / (1 - SWITCH_GAIN)) - 2 * held - 2
    assert _prefill([replace(home, tokens=just_below), away], _hits(p0=40))[0] == "p0"
    assert _prefill([replace(home, tokens=just_below + 4), away], _hits(p0=40))[0] == "p1"
    both = _hits(p0=40, p1=62)  # the move has made it a holder, of more: it stays there
    assert _prefill([home, replace(away, tokens=200)], both)[0] == "p1"


def test_a_block_that_all_share_does_not_lead_all_to_one() -> None:
    """Guards against pure longest match: block 0 of a common system prompt is no reason to queue."""
    view = {worker.identity: worker for worker in PREFILLS}
    chosen: Counter[str] = Counter()
    for turn in range(40):
        request = replace(_hits(p0=1), turn=turn)
        name, _ = _prefill(list(view.values()), request)
        view[name] = replace(view[name], tokens=view[name].tokens + 1000)
        chosen[name] += 1
    assert set(chosen) == set(view) and max(chosen.values()) <= 11


def test_sessions_stick_and_only_those_of_a_lost_worker_move() -> None:
    """Guards rendezvous hashing: stable over restarts and order, balanced, and without a key the least loaded."""
    rules = RoutingRules("session", "never", 16, 0.15)

    def home(view: list[WorkerView], key: int) -> str:
        route = _route([*view, D0], replace(PROMPT, session=key.to_bytes(16, "big")), rules)
        assert route.prefill is not None and route.prefill_reason == "session"
        return route.prefill.identity.partition("/")[0]

    view = [replace(worker, identity=f"{worker.identity}/1", tokens=7) for worker in PREFILLS]
    homes = {key: home(view, key) for key in range(400)}
    assert min(Counter(homes.values()).values()) > 60
    again = [replace(worker, identity=worker.identity.replace("/1", "/2"), tokens=0) for worker in view[::-1]]
    assert {key: home(again, key) for key in homes} == homes
    moved = {key for key in homes if home(view[:3], key) != homes[key]}
    assert moved == {key for key in homes if homes[key] == "p3"}
    free = replace(view[2], tokens=0)
    without = _route([view[0], free, D0], PROMPT, rules)
    assert without.prefill == free and without.prefill_reason == "least_loaded"


IDENTITIES = ("p0", "p1", "p2", "d0", "d1", "d2")
WORKERS = st.builds(
    WorkerView,
    identity=st.just(""),
    address=st.just(""),
    role=st.just(""),
    draining=st.booleans(),
    requests=st.integers(0, 9),
    tokens=st.integers(0, 10_000),
    free_blocks=st.integers(0, 100),
    total_blocks=st.just(100),
    max_num_seqs=st.just(8),
    tokens_s=st.floats(1.0, 1e6),
)
HITS: st.SearchStrategy[Mapping[str, Hit]] = st.dictionaries(
    st.sampled_from((*IDENTITIES, "gone")),
    st.builds(Hit, *[st.integers(0, 15)] * 4).filter(lambda hit: hit.blocks > 0),
)


@given(
    workers=st.fixed_dictionaries({identity: WORKERS for identity in IDENTITIES}),
    hits=HITS,
    avoid=st.frozensets(st.sampled_from(IDENTITIES)),
    policy=st.sampled_from(POLICIES),
    local=st.sampled_from(("never", "short", "auto", "always")),
    turn=st.integers(0, 100),
)
def test_no_policy_picks_whom_it_must_not(
    workers: dict[str, WorkerView], hits: Mapping[str, Hit], avoid: frozenset[str], policy: str, local: str, turn: int
) -> None:
    """Guards every policy against draining, full and avoided workers and wrong roles, whatever the loads and hits."""
    roles = {"p": "prefill", "d": "decode"}
    view = [replace(worker, identity=name, role=roles[name[0]]) for name, worker in workers.items()]
    request = RequestView(1000, 63, turn, avoid, 16, hits=hits, session=b"k" * (turn % 2))
    route = pick(view, request, RoutingRules(policy, local, 16, 0.15))
    ready = [worker for worker in view if not worker.draining]
    if isinstance(route, Wait):
        decodes = [worker for worker in ready if worker.role == "decode"]
        kept = [worker for worker in decodes if worker.identity not in avoid] or decodes
        assert not any(worker.requests < 8 and worker.free_blocks >= 63 for worker in kept) or route.missing
        return
    for worker, role in ((route.decode, "decode"), (route.prefill, "prefill")):
        if worker is None:
            continue
        assert worker.role == role and not worker.draining
        if worker.identity in avoid:
            assert all(other.identity in avoid for other in ready if other.role == role)
    assert route.decode.requests == 0 or (route.decode.requests < 8 and route.decode.free_blocks >= 63)
    assert route.hit_tokens == request.hit_tokens(route.computes.identity)
    assert {route.decode_reason, route.prefill_reason} <= {*CHOICE_REASONS, ""} and route.decode_reason


@pytest.mark.parametrize("policy", POLICIES)
def test_a_failed_pair_is_avoided_by_another_worker_of_either_role(policy: str) -> None:
    """Guards against sending prompts over a link that does not work while another does."""
    rules = RoutingRules(policy, "never", 16, 0.15)
    for turn in range(4):
        request = replace(REQUEST, turn=turn, session=bytes([turn]), failed_pairs=frozenset({("p0", "d0")}))
        route = _route([P0, P1, D0, D1], request, rules)
        assert route.prefill is not None and (route.prefill.identity, route.decode.identity) != ("p0", "d0")
        assert _route([P0, D0, D1], request, rules).decode == D1
        assert _route([P0, P1, D0], request, rules).prefill == P1


@pytest.mark.parametrize(("mode", "reason"), [("auto", "local_transfer_failed"), ("never", "disaggregated")])
def test_where_all_pairs_failed_the_decode_worker_computes_unless_that_is_forbidden(mode: str, reason: str) -> None:
    request = replace(REQUEST, failed_pairs=frozenset({("p0", "d0"), ("p1", "d0")}))
    route = _route([P0, P1, D0], request, replace(RULES, local_prefill=mode))
    assert (route.reason, route.prefill is None) == (reason, mode == "auto")


@pytest.mark.parametrize(("mode", "reason"), [("short", "local_transfer_failed"), ("never", "disaggregated")])
def test_a_request_whose_transfer_failed_depends_on_no_second_one(mode: str, reason: str) -> None:
    """Guards the bound on a client's wait where all links stand still: each of them takes seconds to be noticed."""
    request = replace(REQUEST, transfer_failed=True, avoid=frozenset({"p0", "d0"}))
    route = _route([P0, P1, D0, D1], request, replace(RULES, local_prefill=mode))
    assert (route.reason, route.decode) == (reason, D1)
