"""prefill.role without processes: chunks, hand-over, and blocks that stay leased until the transfer has ended."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from baton.kvtransfer.blocks.hashing import block_hashes
from baton.kvtransfer.blocks.manager import BlockManager
from baton.kvtransfer.protocol.events import SenderEnded
from baton.kvtransfer.store.client import NO_STORE
from baton.models.batch import Done, Drawn, Row
from baton.node.leg import LegKey
from baton.node.membership import ProxyLost
from baton.node.messages.base import Message
from baton.node.messages.control import (
    Busy,
    Cancel,
    Cancelled,
    DispatchBody,
    Failed,
    HandedOver,
    Prefill,
    PromptLogprob,
    PromptLogprobs,
    SamplingSpec,
    Stages,
    Tokens,
)
from baton.prefill.role import PrefillRole
from baton.prefill.settings import PrefillSettings
from baton.tests.unit.kvtransfer.store.bench import InlineStore, World
from baton.tests.unit.worker.bench import BLOCK, ROOT, STEP_S, RecordingIo, parts_of
from baton.worker.io_thread import FromProxy
from baton.worker.loop import Loop

LEG = LegKey("a", 0)


class CountingRunner:
    """A runner whose next token is the number of known tokens."""

    config = SimpleNamespace(vocab_size=1000)

    def __init__(self, on_step: Callable[[], None], run_ahead: int) -> None:
        self.run_ahead = run_ahead
        self.steps: list[list[tuple[int, int]]] = []
        self._on_step = on_step

    def launch(self, rows: Rows[Row]) -> Done:
        self._on_step()
        self.steps.append([(row.start, len(row.token_ids)) for row in rows])
        return Done([Drawn((row.start + len(row.token_ids),)) if row.draw else None for row in rows])


class RecordingChecksums:
    """Checksums that are the block's number, available when the step is read."""

    def __init__(self) -> None:
        self.begun: list[list[int]] = []

    def begin(self, blocks: list[int]) -> Callable[[], dict[int, bytes]]:
        self.begun.append(list(blocks))
        return lambda: {block: b"%d" % block for block in blocks}


class Bench:
    """A prefill worker without processes."""

    def __init__(self, num_blocks: int = 16, run_ahead: int = 0, world: World | None = None, **settings: Any) -> None:
        self.io, self.runner = RecordingIo(), CountingRunner(self._pass, run_ahead)
        self.now_s = 1000.0
        self.manager = BlockManager(num_blocks)
        self.store: Any = NO_STORE
        if world is not None:
            self.store = InlineStore(world, f"p{len(world.workers)}", num_blocks, self.io.inbox.put)
        self.checksums = RecordingChecksums()
        options = PrefillSettings(**settings)
        self.parts = parts_of(
            self.runner,
            self.io,
            self.manager,
            lambda: self.now_s,
            max_model_len=64,
            store=self.store,
            always_load=options.store_loads == "always",
            checksums=self.checksums,
        )
        self.role = PrefillRole(self.parts, options.sizes("cpu"), options.policy)
        self.loop = Loop(self.parts, self.role, max_waiting=options.max_waiting, drain_s=options.drain_s)

    def _pass(self) -> None:
        self.now_s += STEP_S

    def prefill(self, name: str, num_tokens: int, **sampling: Any) -> None:
        self.deliver(FromProxy("proxy", self.message(name, num_tokens, **sampling), self.now_s))

    def message(self, name: str, num_tokens: int, **sampling: Any) -> Prefill:
        tokens = tuple(range(num_tokens))
        return Prefill(
            request_id=name,
            attempt=0,
            decode="d/1",
            decode_address="tcp://d",
            body=DispatchBody(
                token_ids=tokens,
                prompt_len=num_tokens,
                root=ROOT,
                block_hashes=block_hashes(ROOT, tokens, BLOCK),
                sampling=SamplingSpec(**({"max_tokens": 5} | sampling)),
                deadline_s=100.0,
            ),
        )

    def deliver(self, *events: Any) -> bool:
        for event in events:
            self.io.inbox.put(event)
        return self.loop.turn(0.0)

    def run(self) -> None:
        for _ in range(200):
            if not self.loop.turn(0.0):
                break
        self.loop.check()

    def sent(self, kind: type[Message]) -> list[Any]:
        return [message for message in self.io.sent if isinstance(message, kind)]


def _ended(name: str = "a", ok: bool = True) -> SenderEnded:
    return SenderEnded(LegKey(name, 0), ok, "" if ok else "broken", 3, 0.01)


AHEAD = pytest.mark.parametrize("run_ahead", [0, 1, 2])


@AHEAD
def test_the_gil_is_yielded_to_a_hand_over_during_a_step(run_ahead: int) -> None:
    """Guards against a hand-over that waits for the next launch, and a device that waits for a hand-over."""
    bench = Bench(run_ahead=run_ahead, max_num_batched_tokens=3)  # prompts that are too short to share a block
    for name in ("a", "b", "c"):
        bench.io.inbox.put(FromProxy("proxy", bench.message(name, 3), bench.now_s))
    bench.run()
    assert bench.io.num_yields == (2 if run_ahead else 0)  # no step follows the last one


@AHEAD
def test_chunks_are_offered_as_they_are_computed(run_ahead: int) -> None:
    """Guards the overlap of computing and transfer: full blocks after each chunk, the rest and the token at the end."""
    bench = Bench(run_ahead=run_ahead, max_chunk_tokens=6)
    bench.prefill("a", 14)
    bench.run()
    assert bench.runner.steps == [[(0, 6)], [(6, 6)], [(12, 2)]]
    calls = bench.io.exchange.calls
    assert [(call[0], len(call[2])) for call in calls if call[0] == "blocks_computed"] == [
        ("blocks_computed", 1),
        ("blocks_computed", 3),
        ("blocks_computed", 4),
    ]
    offers = [call for call in calls if call[0] == "blocks_computed"]
    (table,) = {call[2] for call in offers[-1:]}
    assert bench.checksums.begun == [[*table[:1]], [*table[1:3]], [*table[3:]]]  # each block once, when it is complete
    assert [[*call[3]] for call in offers] == bench.checksums.begun
    assert calls[-1] == ("token_drawn", LEG, 14, None)
    (tokens,) = bench.sent(Tokens)
    assert (tokens.index, tokens.ids, tokens.finish) == (0, (14,), "")


def test_blocks_are_sending_until_the_transfer_has_ended() -> None:
    """Guards against reusing blocks that the I/O thread still reads, and against leaking them."""
    bench = Bench(num_blocks=4)
    bench.prefill("a", 14)
    bench.run()
    assert bench.manager.usage().leased == 4 and bench.manager.num_available == 0
    bench.prefill("b", 5)
    assert bench.sent(Tokens)[-1].request_id == "a"  # "b" waits for blocks
    bench.deliver(_ended())
    bench.run()
    assert [message.request_id for message in bench.sent(HandedOver)] == ["a"]
    assert bench.sent(Tokens)[-1].request_id == "b"


@AHEAD
@pytest.mark.parametrize(("sampling", "finish"), [({"max_tokens": 1}, "length"), ({"stop_token_ids": (6,)}, "stop")])
def test_a_request_that_ends_with_its_first_token(sampling: dict[str, Any], finish: str, run_ahead: int) -> None:
    """Guards the single terminal message: Tokens with a finish, no hand-over, and an aborted transfer."""
    bench = Bench(run_ahead=run_ahead)
    bench.prefill("a", 6, **sampling)
    bench.run()
    bench.deliver(_ended(ok=False))
    bench.run()
    assert [message.finish for message in bench.sent(Tokens)] == [finish]
    assert not bench.sent(HandedOver) and not bench.sent(Failed)
    assert bench.io.exchange.calls[-1][:2] == ("cancel_sender", LEG)
    assert bench.manager.num_available == 16


def test_prompts_share_a_step_and_a_prefix() -> None:
    """Guards batching and the prefix cache: the second prompt computes only its new tokens."""
    bench = Bench(max_num_batched_tokens=20)
    bench.prefill("a", 10)
    bench.prefill("b", 14)
    bench.run()
    assert bench.runner.steps == [[(0, 10)], [(8, 6)]]
    assert [message.cached_tokens for message in bench.sent(Tokens)] == [0, 8]


@pytest.mark.parametrize("num_turns", [0, 9])
def test_a_proxy_cancels_only_its_own_requests(num_turns: int) -> None:
    """Guards a prompt that waits, and KV on its way, against a Cancel of another proxy that uses the same id."""
    bench = Bench()
    bench.prefill("a", 6)
    for _ in range(num_turns):
        bench.loop.turn(0.0)
    calls = list(bench.io.exchange.calls)
    bench.role.cancel("proxy 2", Cancel(request_id="a", attempt=0))
    assert bench.io.exchange.calls == calls
    bench.role.cancel("proxy", Cancel(request_id="a", attempt=0))
    assert bench.io.exchange.calls[len(calls) :][0][:2] == ("cancel_sender", LEG)


def test_a_lost_proxy_ends_transfers_that_were_never_granted() -> None:
    """Guards blocks that are leased for a decode worker that never heard of the request: only the deadline would end
    that."""
    bench = Bench()
    bench.prefill("a", 6)
    bench.run()
    calls = len(bench.io.exchange.calls)
    bench.deliver(ProxyLost("proxy 2"))
    assert len(bench.io.exchange.calls) == calls
    bench.deliver(ProxyLost("proxy"))
    assert [call[:2] for call in bench.io.exchange.calls[calls:]] == [("cancel_sender", LEG)]


@AHEAD
@pytest.mark.parametrize("event", ["transfer failed", "cancel", "proxy lost"])
@pytest.mark.parametrize("when", ["computing", "handed to the io"])
def test_every_end_frees_everything(event: str, when: str, run_ahead: int) -> None:
    """Guards against leaks and second terminal messages, in the middle of a prompt and after it."""
    bench = Bench(run_ahead=run_ahead, max_chunk_tokens=4)
    bench.prefill("a", 14)
    if when != "computing":
        bench.run()
    if event == "transfer failed":
        bench.deliver(_ended(ok=False))
    elif event == "cancel":
        bench.deliver(FromProxy("proxy", Cancel(request_id="a", attempt=0), 0.0))
        assert bench.manager.usage().leased > 0  # the I/O thread may still read them
        bench.deliver(_ended(ok=False))
        assert len(bench.sent(Cancelled)) == 1
    else:
        bench.deliver(ProxyLost("proxy"))
        bench.deliver(_ended(ok=False))
    bench.run()
    assert bench.manager.num_available == 16
    assert len(bench.sent(Failed)) == (0 if event == "cancel" else 1)
    assert not bench.sent(HandedOver)


def test_refusals_hold_nothing() -> None:
    """Guards admission: a prompt that is too long fails for good, a full queue is Busy."""
    bench = Bench(num_blocks=2, max_waiting=1)
    bench.prefill("long", 64)
    bench.prefill("a", 9)  # needs three blocks, more than are free, so it waits
    bench.prefill("b", 1)
    assert [(message.request_id, message.retryable) for message in bench.sent(Failed)] == [("long", False)]
    assert [message.request_id for message in bench.sent(Busy)] == ["b"]
    assert bench.manager.num_available == 2


def test_the_first_token_reports_its_stages() -> None:
    """Guards the timeline: the wait behind another prompt is queue; prefill starts at the first chunk."""
    bench = Bench(max_num_batched_tokens=4, max_chunk_tokens=4, policy="fcfs")
    bench.prefill("a", 10)
    bench.now_s += 0.5
    bench.prefill("b", 8)
    bench.run()
    stages = {message.request_id: message.stages for message in bench.sent(Tokens)}
    assert stages["a"] == Stages(prefill_s=0.5 + 3 * STEP_S)
    assert stages["b"] == Stages(queue_s=STEP_S, prefill_s=2 * STEP_S)  # four of its tokens were cached


def test_a_sibling_waits_for_a_shared_prefix() -> None:
    """Guards bursts with a shared prefix: it is computed once, and a waiting prompt does not block others."""
    bench = Bench(num_blocks=64, max_chunk_tokens=8)
    messages = [bench.message("a", 30), bench.message("b", 29), bench.message("c", 3)]
    bench.deliver(*(FromProxy("proxy", message, bench.now_s) for message in messages))
    bench.run()
    computed = [row for step in bench.runner.steps for row in step]
    assert computed[:2] == [(0, 8), (0, 3)], "the third shares no full block, and does not wait"
    assert sum(length for _, length in computed) == 30 + 1 + 3
    assert {message.request_id: message.cached_tokens for message in bench.sent(Tokens)} == {"a": 0, "b": 28, "c": 0}


def test_a_sibling_computes_the_prefix_if_the_other_is_cancelled() -> None:
    """Guards against waiting for blocks that will never be computed."""
    bench = Bench(num_blocks=64, max_chunk_tokens=8)
    bench.prefill("a", 30)
    bench.prefill("b", 30)
    bench.deliver(FromProxy("proxy", Cancel(request_id="a", attempt=0), bench.now_s))
    bench.run()
    (tokens,) = bench.sent(Tokens)
    assert (tokens.request_id, tokens.cached_tokens) == ("b", 16)


def test_no_prompt_waits_for_one_that_comes_later() -> None:
    """Guards priorities: a prompt does not wait for one that it has overtaken."""
    bench = Bench(num_blocks=64, max_chunk_tokens=8)
    bench.prefill("a", 30)
    message = bench.message("b", 30)
    urgent = msgspec.structs.replace(message.body, priority=5)
    bench.deliver(FromProxy("proxy", msgspec.structs.replace(message, body=urgent), bench.now_s))
    assert bench.runner.steps[-1][0] == (8, 8), "from what the first has computed so far, in front of it"


def test_the_load_counts_uncomputed_tokens() -> None:
    """Guards the router's view of the queue: cached tokens are not work, before a prompt starts and after."""
    bench = Bench(num_blocks=64, max_num_seqs=1, max_num_batched_tokens=10)
    bench.prefill("a", 20)
    bench.run()
    assert bench.io.load.prefill_tokens_s == pytest.approx(10 / STEP_S)
    bench.prefill("b", 40)
    assert bench.io.load.waiting_tokens == 40 - 20 - 10
    bench.prefill("c", 42)
    assert bench.io.load.waiting_tokens == 42 - 40, "the second prompt is in the pool by now"


class ScoringRunner(CountingRunner):
    """Each target's log probability is minus its token; its rank is the number of the step that computed it."""

    def launch(self, rows: Rows[Row]) -> Done:
        drawn = super().launch(rows).drawn
        rank = len(self.steps)
        scored = {
            index: tuple(PromptLogprob(-float(token), rank) for token in row.targets.token_ids)
            for index, row in enumerate(rows)
            if row.targets is not None
        }
        return Done(drawn, prompt_logprobs=scored)


def _scoring_bench(**options: Any) -> Bench:
    bench = Bench(**options)
    bench.runner.__class__ = ScoringRunner
    return bench


@AHEAD
def test_prompt_logprobs_come_once_and_before_the_first_token(run_ahead: int) -> None:
    """Guards against an entry that a border of chunks drops or repeats, and entries that follow the token."""
    bench = _scoring_bench(run_ahead=run_ahead, max_chunk_tokens=6)
    bench.prefill("a", 14, prompt_logprobs=2)
    bench.run()
    pieces = bench.sent(PromptLogprobs)
    assert [piece.first for piece in pieces] == [1, 7, 13]
    assert [entry.logprob for piece in pieces for entry in piece.entries] == [-float(token) for token in range(1, 14)]
    assert [entry.rank for piece in pieces for entry in piece.entries] == [1] * 6 + [2] * 6 + [3]
    assert [type(message) for message in bench.io.sent] == [PromptLogprobs] * 3 + [Tokens]


def test_a_scored_prompt_takes_no_cached_prefix_and_gives_its_blocks() -> None:
    """Guards against missing entries of cached positions, also after waiting for another prompt's prefix."""
    bench = _scoring_bench(max_chunk_tokens=6)
    bench.prefill("a", 14)
    bench.prefill("b", 14, prompt_logprobs=0)
    bench.run()
    assert [len(piece.entries) for piece in bench.sent(PromptLogprobs)] == [6, 6, 1]
    assert {piece.request_id for piece in bench.sent(PromptLogprobs)} == {"b"}
    assert [(tokens.request_id, tokens.cached_tokens) for tokens in bench.sent(Tokens)] == [("a", 0), ("b", 0)]
    bench.prefill("c", 14)
    bench.run()
    assert bench.sent(Tokens)[-1].cached_tokens == 12


def test_a_later_attempt_continues_the_entries() -> None:
    """Guards against entries that a new attempt repeats, and a prefix that it could take and does not."""
    bench = _scoring_bench(max_chunk_tokens=64)
    bench.prefill("a", 14)
    bench.run()
    message = bench.message("b", 14, prompt_logprobs=0)
    body = msgspec.structs.replace(message.body, num_scored=9)
    bench.deliver(FromProxy("proxy", msgspec.structs.replace(message, body=body), bench.now_s))
    bench.run()
    (piece,) = bench.sent(PromptLogprobs)
    assert piece.first == 9 and [entry.logprob for entry in piece.entries] == [-9.0, -10.0, -11.0, -12.0, -13.0]
    assert bench.runner.steps[-1] == [(8, 6)], "the token before the first wanted entry is computed"


@AHEAD
@pytest.mark.parametrize("num_tokens", [1, 14])
def test_max_tokens_0_ends_with_the_prompt(run_ahead: int, num_tokens: int) -> None:
    """Guards the one terminal message of a request without a decode leg, and blocks that no transfer gives back."""
    bench = _scoring_bench(run_ahead=run_ahead, max_chunk_tokens=6)
    bench.prefill("a", num_tokens, max_tokens=0, prompt_logprobs=0)
    bench.run()
    assert sum(len(piece.entries) for piece in bench.sent(PromptLogprobs)) == num_tokens - 1
    (tokens,) = bench.sent(Tokens)
    assert (tokens.index, tokens.ids, tokens.finish) == (0, (), "length") and bench.io.sent[-1] is tokens
    assert not [call for call in bench.io.exchange.calls if call[0] in ("open_sender", "token_drawn")]
    assert bench.loop.idle and bench.manager.num_available == 16


@AHEAD
def test_a_cancelled_request_without_decode_gives_its_blocks_back(run_ahead: int) -> None:
    """Guards against waiting for the end of a transfer that was never opened."""
    bench = _scoring_bench(run_ahead=run_ahead, max_chunk_tokens=2)
    bench.prefill("a", 14, max_tokens=0, prompt_logprobs=0)
    bench.deliver(FromProxy("proxy", Cancel(request_id="a", attempt=0), bench.now_s))
    bench.run()
    assert not bench.sent(Tokens) and len(bench.sent(Cancelled)) == 1
    assert bench.loop.idle and bench.manager.num_available == 16
