"""A mixed worker: prompts for others beside its own answers, with steps that run ahead of the host.

Blocks that were offered to another worker must hold the prompt until their transfer has ended, whatever else happens.
"""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.decode.role import DecodeRole
from baton.kvtransfer.blocks.hashing import block_hashes
from baton.kvtransfer.protocol.events import ReceiverEnded, SenderEnded
from baton.node.leg import LegKey
from baton.node.messages.control import (
    Busy,
    Cancel,
    DispatchBody,
    Failed,
    HandedOver,
    Prefill,
    SamplingSpec,
    Tokens,
)
from baton.tests.unit.decode.test_run_ahead import STOP, Bench, expected, next_token, prompt_of
from baton.tests.unit.worker.bench import BLOCK, ROOT
from baton.worker.io_thread import FromProxy


class MixedBench(Bench):
    """A mixed worker whose transfers to others end when the test says so."""

    def __init__(self, run_ahead: int = 0, num_blocks: int = 16, **options: Any) -> None:
        super().__init__(run_ahead, num_blocks, mixed=True, **options)
        self.handed_over: dict[str, tuple[list[int], int]] = {}
        self.ended: set[LegKey] = set()

    def prefill(self, name: str, prompt: list[int], max_tokens: int = 5) -> None:
        self.handed_over[name] = (prompt, max_tokens)
        body = DispatchBody(
            token_ids=tuple(prompt),
            prompt_len=len(prompt),
            root=ROOT,
            block_hashes=block_hashes(ROOT, prompt, BLOCK),
            sampling=SamplingSpec(max_tokens=max_tokens, stop_token_ids=(STOP,)),
            deadline_s=100.0,
        )
        message = Prefill(request_id=name, attempt=0, body=body, decode="m/2", decode_address="tcp://m")
        self.io.inbox.put(FromProxy("proxy", message, 0.0))

    def calls(self, name: str) -> list[tuple[Any, ...]]:
        return [call for call in self.io.exchange.calls if call[0] == name]

    def opened(self) -> list[LegKey]:
        """Legs whose transfers have not ended."""
        return [call[1] for call in self.calls("open_sender") if call[1] not in self.ended]

    def check_offers(self) -> None:
        """What was offered of a live transfer is in the pool."""
        live = set(self.opened())
        for _, leg, blocks, _ in self.calls("blocks_computed"):
            prompt, _ = self.handed_over[leg.request_id]
            if leg in live:
                for place in range(min(len(prompt), len(blocks) * BLOCK)):
                    assert self.runner.pool[blocks[place // BLOCK], place % BLOCK] == prompt[place], leg

    def end_transfer(self, ok: bool = True) -> None:
        """The oldest transfer ends: by itself if its last token has come, else because it was cancelled, or broke."""
        self.check_offers()
        drawn = {call[1] for call in self.calls("token_drawn")}
        stopped = {call[1] for call in self.calls("cancel_sender")}
        for leg in self.opened():
            if leg in drawn or leg in stopped or not ok:
                self.ended.add(leg)
                self.io.inbox.put(SenderEnded(leg, ok and leg in drawn and leg not in stopped, "", 3, 0.01))
                return

    def first_tokens(self, name: str) -> list[int]:
        return [t for m in self.io.sent if isinstance(m, Tokens) and m.request_id == name for t in m.ids]

    def finish(self) -> None:
        for _ in range(3000):
            self.arrive()
            self.end_transfer()
            for transfer_id in list(self.manager._quarantines):
                self.io.inbox.put(ReceiverEnded(transfer_id, "cancelled"))
            if not self.loop.turn(0.0) and self.loop.idle and self.io.inbox.empty():
                break
        super().finish()


ACTION = st.one_of(
    st.tuples(st.just("request"), st.integers(0, 2), st.integers(1, 40), st.integers(0, 20), st.booleans()),
    st.tuples(st.just("prefill"), st.integers(0, 2), st.integers(1, 40), st.integers(0, 3)),
    st.tuples(st.sampled_from(["arrive", "turn", "turn", "turn", "end", "break"])),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
)


@settings(max_examples=80)
@given(
    st.lists(ACTION, min_size=20, max_size=60),
    st.integers(0, 2),
    st.integers(12, 30),
    st.integers(1, 6),
    st.integers(1, 9),
)
def test_any_schedule_keeps_what_was_offered_and_serves_all(actions, run_ahead, num_blocks, rows, chunk):
    """Guards against blocks that are reused while a transfer reads them, against prompts and reservations that wait
    for each other, and against a leg without its terminal message, with arrivals, cancels and preemption."""
    bench = MixedBench(run_ahead, num_blocks, max_num_seqs=rows, max_chunk_tokens=chunk, max_num_batched_tokens=24)
    cancelled, broken = set(), False
    for action in actions:
        name = f"r{len(bench.prompts) + len(bench.handed_over)}"
        match action:
            case ("request", seed, length, max_tokens, remote):
                prompt = prompt_of(seed, length)
                bench.request(name, prompt, max_tokens, remote and next_token(prompt) != STOP and max_tokens > 1)
            case ("prefill", seed, length, max_tokens):
                bench.prefill(name, prompt_of(seed, length), max_tokens)
            case ("cancel", number):
                cancelled.add(f"r{number}")
                bench.cancel(f"r{number}")
            case ("arrive",):
                bench.arrive()
            case ("end",):
                bench.end_transfer()
            case ("break",):
                bench.end_transfer(ok=False)
                broken = True
            case ("turn",):
                bench.loop.turn(0.0)
        bench.hear()
        bench.check_offers()
        bench.manager.check()
    bench.finish()
    refused = {message.request_id for message in bench.io.sent if isinstance(message, Busy)}
    failed = {message.request_id for message in bench.io.sent if isinstance(message, Failed)}
    assert broken or not failed
    for name, (prompt, max_tokens) in bench.prompts.items():
        if name not in cancelled:
            assert bench.tokens(name) == ([] if name in refused else expected(prompt, max_tokens))
    done = {message.request_id for message in bench.io.sent if isinstance(message, HandedOver)}
    for name, (prompt, max_tokens) in bench.handed_over.items():
        if name not in cancelled | failed | refused:
            assert bench.first_tokens(name) == ([next_token(prompt)] if max_tokens else [])
            assert (name in done) == (max_tokens > 1 and next_token(prompt) != STOP)


def test_a_prompt_for_another_worker_is_computed_beside_answers() -> None:
    """Guards the mixed step: the answer goes on while the prompt's chunks are computed."""
    bench = MixedBench(max_chunk_tokens=4, max_num_batched_tokens=24)
    bench.request("own", prompt_of(0, 5), 12, remote=False)
    bench.loop.turn(0.0)
    bench.prefill("other", prompt_of(1, 10))
    before = len(bench.tokens("own"))
    for _ in range(3):
        bench.loop.turn(0.0)
    assert bench.first_tokens("other") == [next_token(prompt_of(1, 10))]
    assert len(bench.tokens("own")) == before + 3
    bench.finish()


def test_a_prompt_without_blocks_is_refused_at_once() -> None:
    """Another worker has reserved for it: if it waited for blocks that reservations hold here, and that worker did the
    same, both would wait until their deadlines."""
    bench = MixedBench(num_blocks=4)
    bench.request("reserved", prompt_of(0, 12), 3, remote=True)
    bench.prefill("other", prompt_of(1, 10))
    bench.hear()
    assert [message.reason for message in bench.io.sent if isinstance(message, Busy)] == ["too few free blocks"]
    bench.finish()


def test_a_prompt_has_a_row_that_no_reservation_takes() -> None:
    """The same for rows."""
    bench = MixedBench(num_blocks=40, max_num_seqs=2)
    bench.request("a", prompt_of(0, 4), 30, remote=False)
    bench.request("b", prompt_of(1, 4), 30, remote=False)
    for _ in range(3):
        bench.loop.turn(0.0)
    bench.prefill("other", prompt_of(2, 10))
    bench.hear()
    bench.request("reserved", prompt_of(0, 12), 3, remote=True)
    bench.hear()
    busy = [(message.request_id, message.reason) for message in bench.io.sent if isinstance(message, Busy)]
    assert busy == [("reserved", "all rows are taken")]
    bench.finish()
    assert bench.first_tokens("other") == [next_token(prompt_of(2, 10))]


def test_an_answer_that_needs_blocks_takes_none_of_a_prompt() -> None:
    """A transfer may be reading them: the answer is preempted itself, though it came first."""
    bench = MixedBench(num_blocks=6, max_chunk_tokens=1)
    bench.request("own", prompt_of(2, 5), 14, remote=False)
    for _ in range(6):
        bench.loop.turn(0.0)
    bench.prefill("other", prompt_of(6, 12))
    for _ in range(12):
        bench.loop.turn(0.0)
    assert bench.role.counters.preemptions and not bench.calls("cancel_sender")
    assert bench.first_tokens("other") == [next_token(prompt_of(6, 12))]
    bench.finish()
    assert bench.tokens("own") == expected(prompt_of(2, 5), 14)


def test_a_cancelled_prompt_keeps_its_blocks_until_its_transfer_has_ended() -> None:
    """The other worker may be reading them."""
    bench = MixedBench(num_blocks=8, max_chunk_tokens=4)
    bench.prefill("other", prompt_of(0, 10))
    bench.loop.turn(0.0)
    bench.io.inbox.put(FromProxy("proxy", Cancel(request_id="other", attempt=0), 0.0))
    bench.loop.turn(0.0)
    assert not bench.role.sequences and bench.manager.num_available < 8
    bench.finish()


def test_a_decode_worker_hands_nothing_over() -> None:
    """Its links are to prefill workers: nothing that it offered would arrive."""
    bench = Bench(0, 16)
    message = Prefill(
        request_id="a",
        attempt=0,
        decode="d/1",
        body=DispatchBody(
            token_ids=(1, 2),
            prompt_len=2,
            root=ROOT,
            block_hashes=(),
            sampling=SamplingSpec(max_tokens=2),
            deadline_s=9.0,
        ),
    )
    bench.io.inbox.put(FromProxy("proxy", message, 0.0))
    bench.hear()
    (answer,) = [each for each in bench.io.sent if isinstance(each, Failed)]
    assert isinstance(bench.role, DecodeRole) and not answer.retryable
