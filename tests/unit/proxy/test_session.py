"""proxy.session: requests whose legs are busy, fail, die, misbehave or are late; both legs are always closed."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import pytest

from baton.kvtransfer.blocks.hashing import block_hashes, cache_salt, root_hash
from baton.node.errors import DeadlineExceeded, PeerLost
from baton.node.messages.base import Message
from baton.node.messages.control import (
    AdapterRef,
    Busy,
    Cancel,
    Cancelled,
    Failed,
    Grammar,
    HandedOver,
    Prefill,
    PromptLogprob,
    PromptLogprobs,
    Reserve,
    Reserved,
    SamplingSpec,
    Stages,
    Tokens,
)
from baton.proxy.inbox import Turns
from baton.proxy.interface import Delta, Generation
from baton.proxy.metrics.timeline import Timeline
from baton.proxy.routing.adapter_places import RequestAdapter
from baton.proxy.routing.fair_queue import Ticket
from baton.proxy.routing.model_workers import ClusterShape, Leg
from baton.proxy.routing.router import RequestView, Route, WorkerView
from baton.proxy.scaling.objectives import LatencyObjectives, ScaleMonitor
from baton.proxy.session import MAX_TOGETHER, MAX_WAITING, Session
from baton.proxy.session_host import Event, ProxyStopping, WorkerLost

SAMPLING = SamplingSpec(max_tokens=8, seed=5)
PROMPT = (1, 2, 3, 4, 5)


def _view(identity: str) -> WorkerView:
    return WorkerView(identity, f"tcp://{identity}", identity[0], False, 0, 0, 100, 100, 8, 1000.0)


class ScriptedHost:
    """Plays dispatcher and workers: `script(worker, message)` answers what a worker was sent."""

    def __init__(self, script: Callable[[str, Message], list[Any]], *, local: bool = False) -> None:
        self._hear: Callable[[Event], None] | None = None
        self.sent: list[tuple[str, Message]] = []
        self.open_legs: set[tuple[str, str]] = set()
        self.admitted: list[RequestView] = []
        self.counted: Counter[str] = Counter()
        self.legs: list[Leg] = []
        self.computed: dict[str, bool] = {}
        self.latency = ScaleMonitor(LatencyObjectives(1.0, 0.1))
        self.first_tokens: list[str] = []
        self.hit_tokens = 0
        self.transfers: list[tuple[str, str, bool]] = []
        self.costs: list[int] = []
        """What each admission counts as; the last one is the correction at the end."""
        self.shapes = [ClusterShape(b"n" * 32, 4, 64)]
        """What the cluster serves at each admission; the last one stays."""
        self._script = script
        self._local = local

    @contextmanager
    def registered(self, request_id: str, hear: Callable[[Event], None]) -> Iterator[None]:
        self._hear = hear
        yield

    async def admit(
        self, model: str, ticket: Ticket, view_of: Callable[[ClusterShape], RequestView], deadline: float
    ) -> tuple[Route, ClusterShape]:
        view_of(self.shapes[0])
        shape = self.shapes[min(len(self.admitted), len(self.shapes) - 1)]
        request = view_of(shape)
        assert ticket.refusable == (not self.admitted), "only the first attempt may be turned away by a full queue"
        assert ticket.num_tokens == request.num_tokens
        self.costs.append(ticket.cost_tokens)
        self.admitted.append(request)
        decode = "d1" if "d0" in request.avoid else "d0"
        prefill = "p1" if "p0" in request.avoid else "p0"
        route = Route(_view(decode), None if self._local else _view(prefill), "test", hit_tokens=self.hit_tokens)
        return route, shape

    def generation_ended(self, model: str, tenant: str, tokens: int) -> None:
        self.costs.append(tokens)

    def latency_of(self, model: str) -> ScaleMonitor:
        return self.latency

    def _send(self, worker: str, message: Message) -> None:
        self.sent.append((worker, message))
        for answer in self._script(worker, message):
            self.hear(answer if isinstance(answer, WorkerLost | ProxyStopping | tuple) else (worker, answer))

    def hear(self, event: Event) -> None:
        assert self._hear is not None
        self._hear(event)

    def open_leg(self, leg: Leg, message: Message) -> None:
        self.legs.append(leg)
        self.open_legs.add((leg.worker, leg.request_id))
        self._send(leg.worker, message)

    def prompt_computed(self, worker: str, request_id: str) -> None:
        self.first_tokens.append(worker)

    def close_leg(self, worker: str, request_id: str, *, computed: bool, cancel: Cancel | None = None) -> None:
        if cancel is not None:
            self._send(worker, cancel)
        self.computed[worker] = computed
        self.open_legs.discard((worker, request_id))

    def transfer_ended(self, prefill: str, decode: str, *, ok: bool) -> None:
        self.transfers.append((prefill, decode, ok))

    def count(self, name: str, amount: int = 1) -> None:
        self.counted[name] += amount

    def sent_of(self, kind: type[Message]) -> list[Any]:
        return [message for _, message in self.sent if isinstance(message, kind)]


def _tokens(index: int, *ids: int, attempt: int = 0, finish: str = "") -> Tokens:
    return Tokens(request_id="r", attempt=attempt, index=index, ids=ids, finish=finish)  # type: ignore[arg-type]


def _session(
    host: ScriptedHost,
    timeout_s: float,
    max_attempts: int,
    timeline: Timeline | None = None,
    cache_salt: bytes = b"",
    sampling: SamplingSpec = SAMPLING,
    generation: Generation | None = None,
) -> Session:
    own = Generation(request_id="r", model="m", prompt_ids=PROMPT, sampling=sampling, cache_salt=cache_salt)
    return Session(
        host,
        generation or own,
        timeline or Timeline(time.monotonic),
        deadline=time.monotonic() + timeout_s,
        turn=0,
        turns=Turns(1),
        max_attempts=max_attempts,
    )


async def _run(
    host: ScriptedHost,
    timeout_s: float = 5.0,
    max_attempts: int = 3,
    timeline: Timeline | None = None,
    cache_salt: bytes = b"",
    sampling: SamplingSpec = SAMPLING,
    generation: Generation | None = None,
) -> list[Delta]:
    deltas = []
    async with aclosing(
        _session(host, timeout_s, max_attempts, timeline, cache_salt, sampling, generation).run()
    ) as run:
        async for together in run:
            deltas += together
    assert not host.open_legs, "a leg is still counted"
    return deltas


def _ids(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.ids]


async def test_both_legs_go_out_at_once_and_tokens_come_back_once() -> None:
    """Guards steps 4 to 9: both messages carry the same hashes; decode's repetition of the first token is dropped."""

    def script(worker: str, message: Message) -> list[Any]:
        match message:
            case Prefill():
                return [_tokens(0, 10), HandedOver(request_id="r", attempt=0, sent_bytes=1, transfer_s=0.1)]
            case Reserve():
                return [Reserved(request_id="r", attempt=0, cached_tokens=0)]
        return []

    host = ScriptedHost(script)
    task = asyncio.create_task(_run(host))
    while len(host.sent) < 2:
        await asyncio.sleep(0)
    host.hear(("d0", _tokens(0, 10, 11)))
    host.hear(("d0", _tokens(2, 12, finish="length")))
    assert _ids(await task) == [10, 11, 12]
    (reserve,), (prefill,) = host.sent_of(Reserve), host.sent_of(Prefill)
    assert host.costs == [len(PROMPT), 3], "at the end it counts as its tokens"
    assert reserve.body == prefill.body and len(reserve.body.block_hashes) == 1
    assert (reserve.prefill, prefill.decode, prefill.decode_address) == ("p0", "d0", "tcp://d0")
    assert host.sent_of(Cancel) == []  # both legs have ended by themselves
    assert host.first_tokens == ["p0"]  # reported once, of the worker that computed the prompt


async def test_an_attempt_has_the_adapter_of_the_one_before() -> None:
    """Guards against an answer that goes on with another adapter, and against blocks that two adapters share."""

    def script(worker: str, message: Message) -> list[Any]:
        if isinstance(message, Reserve) and message.attempt == 0:
            return [_tokens(0, 10, 11), WorkerLost("d0", "killed")]
        return [_tokens(2, 12, attempt=1, finish="stop")] if isinstance(message, Reserve) else []

    adapter = RequestAdapter(AdapterRef(b"a" * 32, "/a"), 8, 1)
    bodies = {}
    for given in (adapter, None):
        host = ScriptedHost(script)
        generation = Generation(request_id="r", model="m", prompt_ids=PROMPT, sampling=SAMPLING, adapter=given)
        assert _ids(await _run(host, generation=generation)) == [10, 11, 12]
        assert {view.adapter for view in host.admitted} == {given}
        bodies[given] = [message.body for message in (*host.sent_of(Reserve), *host.sent_of(Prefill))]
        assert {body.adapter for body in bodies[given]} == {given and given.ref}
    assert {body.root for body in bodies[adapter]} == {root_hash(b"n" * 32, lora=b"a" * 32)}
    names = [{name for body in each for name in body.block_hashes} for each in bodies.values()]
    assert names[0] and names[0].isdisjoint(names[1])


async def test_a_lost_decode_worker_in_mid_stream() -> None:
    """Guards migration: the new attempt starts from the accepted tokens, elsewhere, with the same seed."""

    def script(worker: str, message: Message) -> list[Any]:
        if isinstance(message, Reserve) and message.attempt == 0:
            return [_tokens(0, 10, 11), WorkerLost("d0", "killed")]
        if isinstance(message, Reserve):
            return [_tokens(1, 99, attempt=0), _tokens(2, 12, attempt=1, finish="stop")]
        return []

    host = ScriptedHost(script)
    assert _ids(await _run(host)) == [10, 11, 12]
    second = host.sent_of(Reserve)[1]
    assert second.body.token_ids == (*PROMPT, 10, 11) and second.body.prompt_len == len(PROMPT)
    assert second.body.sampling == SAMPLING and host.admitted[1].avoid == {"d0"}
    cancels = [(w, m.attempt) for w, m in host.sent if isinstance(m, Cancel)]
    assert cancels == [("d0", 0), ("p0", 0), ("p0", 1)]  # d0 may be a member again


async def test_workers_that_were_lost_before_they_were_chosen_again() -> None:
    """Guards legs at workers that are members again: an attempt that ended by an earlier loss would not cancel them,
    and their blocks would be held until the deadline."""

    def script(worker: str, message: Message) -> list[Any]:
        if isinstance(message, Reserve) and message.attempt == 0:
            return [WorkerLost(each, "connection is gone") for each in ("d0", "d1", "p0", "p1")]
        if isinstance(message, Reserve):
            return [_tokens(0, 7, attempt=1, finish="stop")]
        return []

    host = ScriptedHost(script)
    assert _ids(await _run(host)) == [7]
    assert [message.attempt for message in host.sent_of(Reserve)] == [0, 1] and not host.open_legs


async def test_a_lost_prefill_worker_matters_only_before_decode_streams() -> None:
    """Guards both sides of the hand-over: after it the death of prefill does not matter."""

    def script(worker: str, message: Message) -> list[Any]:
        if isinstance(message, Reserve) and message.attempt == 0:
            return [_tokens(0, 10, 11), WorkerLost("p0", "killed"), _tokens(2, 12, finish="stop")]
        return []

    host = ScriptedHost(script)
    assert _ids(await _run(host)) == [10, 11, 12]
    assert len(host.sent_of(Reserve)) == 1

    def early(worker: str, message: Message) -> list[Any]:
        if isinstance(message, Prefill) and message.attempt == 0:
            return [WorkerLost("p0", "killed")]
        if isinstance(message, Reserve) and message.attempt == 1:
            return [_tokens(0, 7, attempt=1, finish="stop")]
        return []

    host = ScriptedHost(early)
    assert _ids(await _run(host)) == [7]
    assert host.admitted[1].avoid == {"p0"}


async def test_the_timeline_holds_every_attempt() -> None:
    """Guards what an operator sees: which worker failed and why, which stages count, what prefill moved."""

    def script(worker: str, message: Message) -> list[Any]:
        attempt = getattr(message, "attempt", 0)
        leg = {"request_id": "r", "attempt": attempt}
        if isinstance(message, Reserve) and attempt == 0:
            return [Busy(**leg, reason="full")]
        if isinstance(message, Reserve) and attempt == 1:
            return [WorkerLost(worker, "killed")]
        if isinstance(message, Prefill) and attempt == 2:
            first = Tokens(**leg, index=0, ids=(7,), stages=Stages(queue_s=1e6))
            moved = HandedOver(**leg, sent_bytes=64, transfer_s=0.5)
            return [first, moved, _tokens(1, 8, attempt=2, finish="stop")]
        return []

    now = iter(range(1000))
    timeline = Timeline(lambda: float(next(now)))
    host = ScriptedHost(script)
    task = asyncio.create_task(_run(host, timeline=timeline))
    assert _ids(await task) == [7, 8]
    timeline.end(finished=True)
    stages = dict(timeline.segments[0].stages)
    assert stages["retry"] > 0.0 and stages["queue"] > 0.0 and stages["prefill_queue"] > 0.0
    assert [bool(attempt.end) for attempt in timeline.attempts] == [True, True, False]
    assert timeline.num_attempts == 3 and len(timeline.prefix_hash) == 32
    assert [(attempt.handed_over, attempt.sent_bytes) for attempt in timeline.attempts] == [
        (False, 0),
        (False, 0),
        (True, 64),
    ]


async def test_busy_is_no_failure() -> None:
    """Guards admission races: any number of Busy answers costs time only, and the other leg is cancelled each time."""
    answers = iter(range(10))

    def script(worker: str, message: Message) -> list[Any]:
        if isinstance(message, Reserve):
            number = next(answers)
            if number < 6:
                return [Busy(request_id="r", attempt=message.attempt, reason="full")]
            return [_tokens(0, 7, attempt=message.attempt, finish="stop")]
        return []

    host = ScriptedHost(script)
    assert _ids(await _run(host, max_attempts=2)) == [7]
    cancelled = [(worker, message.attempt) for worker, message in host.sent if isinstance(message, Cancel)]
    assert [attempt for _, attempt in cancelled] == list(range(7))


@pytest.mark.parametrize("grammar", [None, Grammar(text="start: /a/", end_ids=(1,))])
async def test_the_router_knows_whether_an_answer_has_a_grammar(grammar: Grammar | None) -> None:
    """Guards against a pair of workers that make different masks, at the first attempt and at each later one."""

    def script(worker: str, message: Message) -> list[Any]:
        if isinstance(message, Reserve):
            if message.attempt:
                return [_tokens(0, 7, attempt=message.attempt, finish="stop")]
            return [Failed(request_id="r", attempt=0, reason="x", retryable=True)]
        return []

    host = ScriptedHost(script)
    await _run(host, sampling=SamplingSpec(max_tokens=8, grammar=grammar))
    assert [request.constrained for request in host.admitted] == [grammar is not None] * 2


async def test_failures_end_after_so_many_attempts() -> None:
    """Guards against a request that takes one worker after the other with it."""

    def script(worker: str, message: Message) -> list[Any]:
        if isinstance(message, Reserve):
            return [Failed(request_id="r", attempt=message.attempt, reason="broken", retryable=True)]
        return []

    host = ScriptedHost(script)
    with pytest.raises(PeerLost, match="3 attempts"):
        await _run(host)
    assert len(host.sent_of(Reserve)) == 3 and not host.open_legs
    assert not any(host.computed.values())


@pytest.mark.parametrize("by", [Reserve, Prefill])
async def test_a_transfer_that_fails_avoids_the_pair_and_the_next_attempt_needs_none(by: type[Message]) -> None:
    """Guards against a second attempt over the link that has just failed, whichever end noticed it."""

    def script(worker: str, message: Message) -> list[Any]:
        if isinstance(message, by) and message.attempt == 0:  # type: ignore[attr-defined]
            return [Failed(request_id="r", attempt=0, reason="transfer: stalled", retryable=True, transfer=True)]
        if isinstance(message, Reserve) and message.attempt == 1:
            return [_tokens(0, 7, attempt=1, finish="stop")]
        return []

    host = ScriptedHost(script)
    assert _ids(await _run(host)) == [7]
    assert host.transfers == [("p0", "d0", False)] and not host.open_legs
    assert [(request.avoid, request.transfer_failed) for request in host.admitted] == [
        (frozenset(), False),
        (frozenset({"p0", "d0"}), True),
    ]


async def test_what_a_worker_refuses_is_tried_elsewhere() -> None:
    """Guards the client against blame for a message that was damaged on its way: the proxy has checked the request."""

    def script(worker: str, message: Message) -> list[Any]:
        if isinstance(message, Reserve):
            if message.attempt == 0:
                return [Failed(request_id="r", attempt=0, reason="a token id is outside the", retryable=False)]
            return [_tokens(0, 11, attempt=1, finish="stop")]
        return []

    host = ScriptedHost(script)
    assert _ids(await _run(host)) == [11]
    assert [worker for worker, message in host.sent if isinstance(message, Reserve)] == ["d0", "d1"]
    assert not host.open_legs


async def test_what_all_workers_refuse_is_not_the_clients_error() -> None:
    """Guards against a 400 for a fault of the cluster, and against retries without a limit."""

    def script(worker: str, message: Message) -> list[Any]:
        if isinstance(message, Reserve):
            return [Failed(request_id="r", attempt=message.attempt, reason="too long", retryable=False)]
        return []

    host = ScriptedHost(script)
    with pytest.raises(PeerLost, match="too long"):
        await _run(host)
    assert 1 < len(host.sent_of(Reserve)) <= 5 and not host.open_legs


async def test_a_gap_starts_a_new_attempt() -> None:
    """Guards against a lost message of tokens: nothing after the gap is given out."""

    def script(worker: str, message: Message) -> list[Any]:
        if isinstance(message, Reserve):
            if message.attempt == 0:
                return [_tokens(0, 10), _tokens(2, 12)]
            return [_tokens(1, 11, attempt=1, finish="stop")]
        return []

    assert _ids(await _run(ScriptedHost(script))) == [10, 11]


async def test_messages_of_other_workers_are_ignored() -> None:
    """Guards against messages about this request from a worker that has no leg of it."""

    def script(worker: str, message: Message) -> list[Any]:
        if not isinstance(message, Reserve):
            return []
        stranger = [("x9", _tokens(0, 66, finish="stop")), ("x9", Cancelled(request_id="r", attempt=0))]
        return [*stranger, _tokens(0, 7, finish="stop")]

    host = ScriptedHost(script, local=True)
    assert _ids(await _run(host)) == [7]
    assert host.sent_of(Prefill) == [] and host.sent_of(Reserve)[0].prefill == ""
    assert host.first_tokens == ["d0"]


async def test_the_deadline_ends_a_silent_request() -> None:
    """Guards every wait: workers that say nothing cost no more than the deadline, and are cancelled."""
    host = ScriptedHost(lambda worker, message: [])
    with pytest.raises(DeadlineExceeded):
        await _run(host, timeout_s=0.0)
    assert {worker for worker, message in host.sent if isinstance(message, Cancel)} == {"p0", "d0"}
    assert not host.open_legs


async def test_a_disconnected_client_cancels_both_legs() -> None:
    """Guards step 10 on the way out through aclose."""

    def script(worker: str, message: Message) -> list[Any]:
        return [_tokens(0, 10)] if isinstance(message, Prefill) else []

    host = ScriptedHost(script)
    run = _session(host, timeout_s=60.0, max_attempts=2).run()
    assert [delta.ids for delta in await anext(run)] == [(10,)]
    await run.aclose()
    assert {worker for worker, message in host.sent if isinstance(message, Cancel)} == {"p0", "d0"}
    assert not host.open_legs


async def test_tokens_that_are_there_together_are_read_together() -> None:
    """Guards the writes of a proxy that has more to pass on than it can write token by token."""

    def script(worker: str, message: Message) -> list[Any]:
        if not isinstance(message, Prefill):
            return []
        first = Tokens(request_id="r", attempt=0, index=0, ids=(7,), stages=Stages())
        return [first, _tokens(1, 8), _tokens(2, 9), _tokens(3, 10, finish="stop"), _tokens(4, 11)]

    run = _session(ScriptedHost(script), timeout_s=60.0, max_attempts=1).run()
    together = [[delta.ids for delta in deltas] async for deltas in run]
    assert together == [[(7,)], [(8,), (9,), (10,)]], "a report of stages is of one answer; nothing follows the finish"


async def test_a_session_far_behind_reads_some_at_a_time() -> None:
    """Guards the event loop against one stream with a long backlog: others have their turns between its pieces."""
    tokens = [_tokens(index, index) for index in range(3 * MAX_TOGETHER)]

    def script(worker: str, message: Message) -> list[Any]:
        return [*tokens, _tokens(len(tokens), 1, finish="stop")] if isinstance(message, Prefill) else []

    run = _session(ScriptedHost(script), timeout_s=60.0, max_attempts=1).run()
    together = [[delta.ids[0] for delta in deltas] async for deltas in run]
    assert [len(each) for each in together] == [MAX_TOGETHER] * 3 + [1]
    assert [token for each in together for token in each] == [*range(3 * MAX_TOGETHER), 1]


async def test_a_client_that_does_not_read_is_paused() -> None:
    """Guards the memory of the proxy, and the worker's KV: the attempt ends, what came stays in order, and when the
    client reads again another attempt goes on where it ended."""
    late = Tokens(request_id="r", attempt=0, index=4 * MAX_WAITING, ids=(0,))

    def script(worker: str, message: Message) -> list[Any]:
        if isinstance(message, Reserve) and message.attempt == 0:
            return [_tokens(0, 0)]
        if isinstance(message, Reserve):
            num_sent = len(message.body.token_ids) - len(PROMPT)
            return [_tokens(num_sent, num_sent, attempt=1), _tokens(num_sent + 1, 7, attempt=1, finish="stop")]
        return []

    host = ScriptedHost(script, local=True)
    session = _session(host, timeout_s=60.0, max_attempts=1)
    async with aclosing(session.run()) as run:
        read = await anext(run)
        for index in range(1, 4 * MAX_WAITING):
            host.hear(("d0", _tokens(index, index)))
        assert len(host.sent_of(Cancel)) == 1 and not host.open_legs
        assert len(session._inbox) <= MAX_WAITING + 1
        async for deltas in run:
            read += deltas
            host.hear(("d0", late))
    num_read = MAX_WAITING + 1
    assert [delta.ids[0] for delta in read] == [*range(num_read + 1), 7] and read[-1].finish == "stop"
    assert len(host.sent_of(Reserve)[1].body.token_ids) == len(PROMPT) + num_read
    assert (host.counted["paused_total"], host.counted["resumed_total"]) == (1, 1) and not host.open_legs


async def test_a_late_proxy_pauses_no_client() -> None:
    """Guards against an overload that ends attempts of clients that read: their backlog is the proxy's own."""
    tokens = [_tokens(index, index) for index in range(2 * MAX_WAITING)]

    def script(worker: str, message: Message) -> list[Any]:
        return [*tokens, _tokens(len(tokens), 1, finish="stop")] if isinstance(message, Prefill) else []

    host = ScriptedHost(script)
    assert len(await _run(host)) == 2 * MAX_WAITING + 1
    assert not host.counted["paused_total"]


async def test_a_paused_request_hears_of_the_end() -> None:
    """Guards shutdown and deadline of a request whose client does not read: they are not dropped as its tokens are."""
    host = ScriptedHost(lambda worker, message: [_tokens(0, 0)] if isinstance(message, Reserve) else [], local=True)
    async with aclosing(_session(host, timeout_s=60.0, max_attempts=1).run()) as run:
        await anext(run)
        for index in range(1, 2 * MAX_WAITING):
            host.hear(("d0", _tokens(index, index)))
        host.hear(ProxyStopping())
        with pytest.raises(PeerLost, match="shutting down"):
            async for _ in run:
                pass
    assert not host.open_legs


async def test_tokens_before_a_failure_that_came_with_them_reach_the_client() -> None:
    """Guards tokens that the ledger has: no later attempt sends them again. What else came is still heard."""
    lost = WorkerLost("d0", "died")

    def script(worker: str, message: Message) -> list[Any]:
        if isinstance(message, Prefill) and worker == "p0" and message.attempt == 0:
            return [_tokens(0, 7), ("d0", _tokens(1, 8)), lost, ProxyStopping()]
        return []

    host = ScriptedHost(script)
    run = _session(host, timeout_s=60.0, max_attempts=3).run()
    assert [delta.ids for delta in await anext(run)] == [(7,), (8,)]
    with pytest.raises(PeerLost, match="shutting down"):
        await anext(run)
    assert not host.open_legs


async def test_predicted_hits_are_compared_with_actual_ones() -> None:
    """Guards the counters by which wrong predictions are seen, and the work that is counted at dispatch."""

    def script(worker: str, message: Message) -> list[Any]:
        if isinstance(message, Prefill):
            first = Tokens(request_id="r", attempt=0, index=0, ids=(7,), cached_tokens=1)
            return [first, _tokens(1, 8, finish="stop")]
        return []

    host = ScriptedHost(script)
    host.hit_tokens = 4
    assert _ids(await _run(host)) == [7, 8]
    kinds = ("predicted", "actual", "missed", "unforeseen")
    assert [host.counted[f"kv_hit_{kind}_tokens_total"] for kind in kinds] == [4, 1, 3, 0]
    (view,) = host.admitted
    assert len(view.hashes) == 1 and view.block_tokens == 4
    decode, prefill = host.legs
    assert (decode.tokens, decode.hashes) == (0, ())
    assert (prefill.tokens, prefill.hashes) == (1, view.hashes)
    assert host.computed == {"p0": True, "d0": True}


async def test_a_decode_leg_that_ends_before_the_finish_of_prefill_is_known() -> None:
    """Guards requests that finish at their first token: whose word comes first does not matter."""

    def script(worker: str, message: Message) -> list[Any]:
        if isinstance(message, Prefill):
            return [("d0", Cancelled(request_id="r", attempt=0)), _tokens(0, 7, finish="length")]
        return []

    host = ScriptedHost(script)
    assert _ids(await _run(host)) == [7]
    assert len(host.sent_of(Reserve)) == 1


async def test_blocks_are_named_for_the_cluster_that_the_route_leads_to() -> None:
    """Guards against KV stored under the names of a model that has left while the request waited for a worker."""

    def script(worker: str, message: Message) -> list[Any]:
        match message:
            case Reserve(attempt=0):
                return [Busy(request_id="r", attempt=0, reason="full")]
            case Reserve():
                return [_tokens(0, 7, attempt=1, finish="stop")]
        return []

    host = ScriptedHost(script, local=True)
    first, second = ClusterShape(b"n" * 32, 4, 64), ClusterShape(b"m" * 32, 2, 64)
    host.shapes = [first, second]
    assert _ids(await _run(host)) == [7]
    roots = [message.body.root for message in host.sent_of(Reserve)]
    assert roots == [root_hash(first.namespace), root_hash(second.namespace)]
    assert [len(message.body.block_hashes) for message in host.sent_of(Reserve)] == [1, 2]
    assert [view.num_blocks for view in host.admitted] == [2, 3]


async def test_the_salt_names_the_blocks_of_both_legs_and_of_each_attempt() -> None:
    """Guards against KV that is shared between salts: in routing, in the prefill pool, in decode's and after a retry,
    whose blocks hold tokens that were generated."""

    def script(worker: str, message: Message) -> list[Any]:
        match message:
            case Prefill(attempt=0):
                return [_tokens(0, 7, 8, 9), WorkerLost("d0", "killed")]
            case Reserve(attempt=1):
                return [_tokens(3, 10, attempt=1, finish="stop")]
        return []

    roots = {}
    for salt in (b"", cache_salt("a"), cache_salt("b")):
        host = ScriptedHost(script)
        assert _ids(await _run(host, cache_salt=salt)) == [7, 8, 9, 10]
        root = roots[salt] = root_hash(b"n" * 32, salt)
        bodies = [message.body for _, message in host.sent if isinstance(message, Prefill | Reserve)]
        assert len(bodies) == 4 and [len(body.block_hashes) for body in bodies] == [1, 1, 2, 2]
        assert all(body.root == root and body.block_hashes == block_hashes(root, body.token_ids, 4) for body in bodies)
        assert [view.hashes for view in host.admitted] == [bodies[0].block_hashes, bodies[2].block_hashes[:1]]
    assert len(set(roots.values())) == 3


SCORED = SamplingSpec(max_tokens=8, seed=5, prompt_logprobs=1)
ENTRIES = tuple(PromptLogprob(-float(token), 1) for token in PROMPT[1:])


def _entries(first: int, last: int, attempt: int = 0) -> PromptLogprobs:
    """Of tokens first .. last of the prompt."""
    return PromptLogprobs(request_id="r", attempt=attempt, first=first, entries=ENTRIES[first - 1 : last])


def _entries_of(deltas: list[Delta]) -> tuple[PromptLogprob, ...]:
    return tuple(entry for delta in deltas for entry in delta.prompt_logprobs)


def _ids_of(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.ids]


async def test_prompt_logprobs_come_before_tokens_that_overtook_them() -> None:
    """Guards the order: decode's tokens come over another link than prefill's entries."""

    def script(worker: str, message: Message) -> list[Any]:
        if isinstance(message, Reserve):
            return [_tokens(0, 7, 8), _tokens(2, 9, finish="stop")]
        return [_entries(1, 2), _entries(3, 4), _tokens(0, 7)] if isinstance(message, Prefill) else []

    host = ScriptedHost(script)
    deltas = await _run(host, sampling=SCORED)
    assert _entries_of(deltas) == ENTRIES and _ids_of(deltas) == [7, 8, 9]
    assert [bool(delta.prompt_logprobs) for delta in deltas] == [True, True] and deltas[-1].finish == "stop"
    assert not host.open_legs and host.admitted[0].hashes == ()


async def test_a_new_attempt_continues_the_prompt_logprobs() -> None:
    """Guards exactly one entry a token after a worker's death, also where decode was already sending."""

    def script(worker: str, message: Message) -> list[Any]:
        if isinstance(message, Reserve) and worker == "d0" and message.attempt == 0:
            return [_tokens(0, 7)]
        if isinstance(message, Prefill) and message.attempt == 0:
            return [_entries(1, 2), WorkerLost("p0", "died"), (worker, _entries(3, 4))]
        if isinstance(message, Prefill):
            assert message.body.num_scored == 3 and message.body.token_ids == PROMPT
            return [_entries(3, 4, 1), _entries(3, 4, 1), _tokens(0, 7, attempt=1, finish="length")]
        return []

    host = ScriptedHost(script)
    deltas = await _run(host, sampling=SCORED)
    assert _entries_of(deltas) == ENTRIES and _ids_of(deltas) == [7]
    assert host.counted["retries_total"] == 1 and not host.open_legs


@pytest.mark.parametrize("late", [_tokens(0, 7), HandedOver(request_id="r", attempt=0, sent_bytes=0, transfer_s=0.0)])
async def test_missing_prompt_logprobs_fail_the_attempt(late: Message) -> None:
    """Guards against waiting until the deadline for entries that were lost."""

    def script(worker: str, message: Message) -> list[Any]:
        if isinstance(message, Prefill):
            return [_entries(4, 4, 1)] if message.attempt == 1 else [_entries(1, 2), late]
        return []

    with pytest.raises(PeerLost, match="gave up after 2 attempts"):
        await _run(ScriptedHost(script), sampling=SCORED, max_attempts=2)


@pytest.mark.parametrize("local", [False, True])
async def test_max_tokens_0_has_one_leg_and_one_delta_with_a_finish(local: bool) -> None:
    """Guards against a reservation for no token, and an answer that never ends."""

    def script(worker: str, message: Message) -> list[Any]:
        return [_entries(1, 4), _tokens(0, finish="length")] if isinstance(message, Prefill | Reserve) else []

    host = ScriptedHost(script, local=local)
    deltas = await _run(host, sampling=SamplingSpec(max_tokens=0, prompt_logprobs=0))
    assert _entries_of(deltas) == ENTRIES and deltas[-1].finish == "length" and not _ids_of(deltas)
    assert [type(message) for _, message in host.sent] == [Reserve if local else Prefill]
    assert local or host.sent_of(Prefill)[0].decode == ""
    assert not host.open_legs
