"""Steps that run ahead of the host: each sequence gets its own tokens under any arrivals, cancels and preemptions.

The runner computes a step only when it is read, as a late device would, from a pool whose slots hold token ids: a block
that is freed too early is overwritten by the late step, and the next tokens are wrong.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence as Rows
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.decode.role import DecodeRole
from baton.decode.settings import DecodeSettings
from baton.kvtransfer.blocks.hashing import block_hashes
from baton.kvtransfer.blocks.manager import BlockManager
from baton.kvtransfer.protocol.events import KvArrived, ReceiverEnded
from baton.models.batch import DeviceTime, Drawn, Row
from baton.models.drafts import num_accepted
from baton.node.messages.control import (
    Bundle,
    Busy,
    Cancel,
    DispatchBody,
    Failed,
    PromptLogprob,
    PromptLogprobs,
    Reserve,
    SamplingSpec,
)
from baton.tests.unit.worker.bench import BLOCK, ROOT, RecordingIo, parts_of
from baton.worker.in_flight import InFlightStep
from baton.worker.io_thread import FromProxy
from baton.worker.loop import Loop
from baton.worker.pending_prefixes import cacheable_names
from baton.worker.sequence import Sequence

VOCAB, STOP = 13, 5
MAX_MODEL_LEN = 48


def next_token(context: list[int]) -> int:
    """The next token: a hash of all previous tokens in order."""
    value = 7
    for token in context:
        value = (value * 31 + token + 1) % 10007
    return value % VOCAB


def score(context: list[int]) -> PromptLogprob:
    """The entry of the last token of `context`."""
    return PromptLogprob(-1.0 - next_token(context[:-1]), 1 + context[-1])


def expected(prompt: list[int], max_tokens: int) -> list[int]:
    known = list(prompt)
    while max_tokens:
        known.append(next_token(known))
        done = len(known) - len(prompt) == max_tokens or len(known) == MAX_MODEL_LEN
        if known[-1] == STOP or done:
            break
    return known[len(prompt) :]


def prompt_of(seed: int, length: int) -> list[int]:
    """Prompts of one seed are prefixes of one another."""
    return [(seed * 7 + place * place) % VOCAB for place in range(length)]


class LateStep:
    def __init__(self, runner: LateRunner, rows: list[Row]) -> None:
        self._runner, self._rows = runner, rows
        self.device_time: DeviceTime | None = None

    def read(self) -> list[Drawn | None]:
        assert self._runner.launched.pop(0) is self, "steps must be read in the order of their launch"
        drawn = [self._compute(row) for row in self._rows]
        self.prompt_logprobs = {index: self._score(row) for index, row in enumerate(self._rows) if row.targets}
        return drawn

    def _score(self, row: Row) -> tuple[PromptLogprob, ...]:
        """One entry a target, made of it and of what the pool has before it."""
        first = row.start + row.targets.offset + 1
        context = [self._runner.pool[row.blocks[p // BLOCK], p % BLOCK] for p in range(first - 1 + len(row.targets[1]))]
        return tuple(score([*context[: first + n], token]) for n, token in enumerate(row.targets.token_ids))

    def _compute(self, row: Row) -> Drawn | None:
        runner, start = self._runner, row.start if row.token_ids else self._runner.lengths[row.slot]
        token_ids = row.token_ids or [runner.last_drawn[row.slot]]
        assert start >= row.start
        if row.draw is None:
            self._write(row, start, token_ids)
            return None
        length = start + len(token_ids)
        longest = min(MAX_MODEL_LEN, row.draw.prompt_len + row.draw.sampling.max_tokens)
        if length >= longest and not row.token_ids:
            return Drawn(())  # the step before drew the last token
        self._write(row, start, token_ids)
        assert row.draw.num_generated <= length - row.draw.prompt_len
        context = [runner.pool[row.blocks[place // BLOCK], place % BLOCK] for place in range(length)]
        drafts = runner.drafts_behind(context, min(row.most_drafts, longest - length - 1))
        self._write(row, length, drafts)
        drawn = [next_token([*context, *drafts[:count]]) for count in range(len(drafts) + 1)]
        drawn = drawn[: num_accepted(drafts, drawn) + 1]
        runner.last_drawn[row.slot], runner.lengths[row.slot] = drawn[-1], length - 1 + len(drawn)
        return Drawn(tuple(drawn), num_drafts=len(drafts))

    def _write(self, row: Row, start: int, token_ids: Rows[int]) -> None:
        for place, token in enumerate(token_ids, start):
            self._runner.pool[row.blocks[place // BLOCK], place % BLOCK] = token


class LateRunner:
    """A runner that computes a step when it is read, and keeps each slot's last token and length. Its drafts are right
    up to one that depends on `skill` and what is before them."""

    config = SimpleNamespace(vocab_size=VOCAB)

    def __init__(self, run_ahead: int, skill: int = 0) -> None:
        self.run_ahead, self.skill = run_ahead, skill
        self.lengths: dict[int, int] = {}
        self.pool: dict[tuple[int, int], int] = {}
        self.last_drawn: dict[int, int] = {}
        self.launched: list[LateStep] = []

    def drafts_behind(self, context: list[int], most: int) -> list[int]:
        known, num_right = list(context), (next_token(context) * self.skill) % 5
        for number in range(most):
            right = next_token(known)
            known.append(right if number < num_right else (right + 1) % VOCAB)
        return known[len(context) :]

    def launch(self, rows: Rows[Row]) -> LateStep:
        assert len({row.slot for row in rows}) == len(rows), "two rows in one slot"
        for row in rows:
            assert len(row.blocks) * BLOCK >= row.start + row.num_new + row.most_drafts, "computed without blocks"
        # The worker changes its lists after the launch, which must not affect the step.
        step = LateStep(self, [r._replace(token_ids=list(r.token_ids), blocks=list(r.blocks)) for r in rows])
        self.launched.append(step)
        assert len(self.launched) <= self.run_ahead + 1
        return step


class Bench:
    """A decode worker over a late runner; transfers write into the pool when they arrive."""

    def __init__(self, run_ahead: int, num_blocks: int, skill: int = 0, **options: Any) -> None:
        self.io, self.runner, self.manager = RecordingIo(), LateRunner(run_ahead, skill), BlockManager(num_blocks)
        settings = DecodeSettings(spare_blocks=0, **options)
        self.parts = parts_of(self.runner, self.io, self.manager, time.monotonic, max_model_len=MAX_MODEL_LEN)
        sizes = settings.sizes("cpu")
        self.role = DecodeRole(self.parts, sizes, settings.spare_blocks, settings.role, settings.most_drafts)
        self.loop = Loop(self.parts, self.role, max_waiting=settings.max_waiting, drain_s=settings.drain_s)
        self.prompts: dict[str, tuple[list[int], int]] = {}

    def request(
        self,
        name: str,
        prompt: list[int],
        max_tokens: int,
        remote: bool,
        priority: int = 0,
        num_top: int | None = None,
    ) -> None:
        self.prompts[name] = (prompt, max_tokens)
        reserve = Reserve(
            request_id=name,
            attempt=0,
            prefill="p/1" if remote else "",
            body=DispatchBody(
                token_ids=tuple(prompt),
                prompt_len=len(prompt),
                root=ROOT,
                block_hashes=block_hashes(ROOT, prompt, BLOCK),
                sampling=SamplingSpec(max_tokens=max_tokens, stop_token_ids=(STOP,), prompt_logprobs=num_top),
                deadline_s=100.0,
                priority=priority,
            ),
        )
        self.io.inbox.put(FromProxy("proxy", reserve, 0.0))

    def arrive(self) -> None:
        """Complete the oldest transfer: write its blocks, and give its sequence the first token."""
        reserved = self.role._reservations.by_transfer
        for transfer_id, sequence in list(reserved.items())[:1]:
            for place, token in enumerate(sequence.token_ids):
                block = sequence.table.blocks[place // BLOCK]
                if place // BLOCK >= sequence.incoming.first_block:
                    self.runner.pool[block, place % BLOCK] = token
            self.io.inbox.put(KvArrived(transfer_id, next_token(sequence.token_ids), None, 0.0, 0.0, 0.0))

    def hear(self) -> None:
        """The part of a turn before its step."""
        for event in self.io.receive(0.0):
            self.loop._on(event)

    def cancel(self, name: str) -> None:
        self.io.inbox.put(FromProxy("proxy", Cancel(request_id=name, attempt=0), 0.0))

    def tokens(self, name: str) -> list[int]:
        sent = [t for m in self.io.sent if isinstance(m, Bundle) for t in m.tokens if t.request_id == name]
        assert [t.index for t in sent] == [sum(len(u.ids) for u in sent[:i]) for i in range(len(sent))]
        return [token for tokens in sent for token in tokens.ids]

    def prompt_logprobs(self, name: str) -> list[PromptLogprob]:
        """Of a request that did not fail; they came before its tokens."""
        sent = [m for m in self.io.sent if isinstance(m, PromptLogprobs) and m.request_id == name]
        assert [m.first for m in sent] == [1 + sum(len(u.entries) for u in sent[:i]) for i in range(len(sent))]
        of_name = [
            m for m in self.io.sent if m in sent or (isinstance(m, Bundle) and name in [t.request_id for t in m.tokens])
        ]
        assert of_name[: len(sent)] == sent
        return [entry for message in sent for entry in message.entries]

    def finish(self) -> None:
        """End everything that is open, and check that all blocks are freed."""
        for _ in range(3000):
            self.arrive()
            for transfer_id in list(self.manager._quarantines):
                self.io.inbox.put(ReceiverEnded(transfer_id, "cancelled"))
            if not self.loop.turn(0.0) and not self.role.sequences and self.io.inbox.empty():
                break
        assert not self.role.sequences and not self.runner.launched
        self.loop.check()
        assert self.manager.num_available == self.manager.num_blocks
        assert sorted(self.role._queues.free_slots) == list(range(len(self.role._queues.free_slots)))


REQUEST = st.tuples(
    st.just("request"),
    st.integers(0, 2),
    st.integers(1, 40),
    st.integers(0, 20),
    st.booleans(),
    st.sampled_from([0, 0, 0, 1]),
    st.sampled_from([None, None, 0]),
)
ACTION = st.one_of(
    REQUEST,
    st.tuples(st.sampled_from(["arrive", "turn", "turn", "turn"])),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
    st.tuples(st.just("take over"), st.integers(0, 9), st.integers(1, VOCAB)),
)


@settings(max_examples=150)
@given(
    st.lists(ACTION, min_size=20, max_size=60),
    st.integers(0, 2),
    st.integers(12, 30),
    st.integers(1, 6),
    st.integers(1, 9),
    st.sampled_from([0, 0, 1, 3, 7]),
    st.integers(0, 3),
)
def test_any_schedule_gives_the_tokens_of_synchronous_steps(actions, run_ahead, num_blocks, rows, chunk, most, skill):
    """Guards against tokens of an ended sequence, of a slot's previous owner or of blocks reused too early, and
    against leaked blocks or slots, with arrivals, cancels, preemption, and drafts accepted up to any of them."""
    drafts = {"speculate": "ngram", "speculate_tokens": most} if most else {}
    sizes = {"max_num_seqs": rows, "max_chunk_tokens": chunk, "max_num_batched_tokens": 24}
    bench = Bench(run_ahead, num_blocks, skill, **sizes, **drafts)
    cancelled, scored = set(), set()
    for action in actions:
        name = f"r{len(bench.prompts)}"
        match action:
            case ("request", seed, length, max_tokens, remote, priority, num_top):
                prompt = prompt_of(seed, length)
                remote = remote and next_token(prompt) != STOP and max_tokens > 1  # else prefill ends it
                bench.request(name, prompt, max_tokens, remote, priority, num_top)
                if num_top is not None and not remote:
                    scored.add(name)
            case ("arrive",):
                bench.arrive()
            case ("cancel", number):
                cancelled.add(f"r{number}")
                bench.cancel(f"r{number}")
            case ("take over", number, length):
                # A transfer takes the blocks of a cancelled sequence at once.
                cancelled.add(f"r{number}")
                bench.cancel(f"r{number}")
                bench.hear()
                bench.request(name, list(range(length)), 20, remote=next_token(list(range(length))) != STOP)
                bench.hear()
                bench.arrive()
            case ("turn",):
                bench.loop.turn(0.0)
        bench.hear()
        bench.manager.check()
    bench.finish()
    refused = {message.request_id for message in bench.io.sent if isinstance(message, Busy)}
    assert not [message for message in bench.io.sent if isinstance(message, Failed)]
    for name, (prompt, max_tokens) in bench.prompts.items():
        sent, right = bench.tokens(name), expected(prompt, max_tokens)
        if name in cancelled:
            assert sent == right[: len(sent)]
        else:
            assert sent == ([] if name in refused else right)
        entries = bench.prompt_logprobs(name)
        right_entries = [score(prompt[: end + 1]) for end in range(1, len(prompt))] if name in scored else []
        assert entries == (right_entries[: len(entries)] if name in cancelled or name in refused else right_entries)


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40), st.integers(0, 3)), min_size=2, max_size=12),
    st.integers(0, 2),
    st.integers(1, 6),
    st.integers(1, 9),
)
def test_no_block_of_a_shared_prefix_is_computed_twice(requests, run_ahead, rows, chunk):
    """Guards against computing what another request computes, with any arrivals, and against a wait without an end."""
    bench = Bench(run_ahead, 200, max_num_seqs=rows, max_chunk_tokens=chunk, max_num_batched_tokens=24)
    computed: Counter[bytes] = Counter()
    launch = bench.role.steps.launch

    def launch_and_count(batch: list[tuple[Sequence, int]]) -> InFlightStep:
        for sequence, length in batch:
            names = cacheable_names(sequence)
            places = range(sequence.num_launched, sequence.num_launched + length)
            computed.update(names[place // BLOCK] for place in places if place // BLOCK < len(names))
        return launch(batch)

    bench.role.steps.launch = launch_and_count
    for number, (seed, length, turns) in enumerate(requests):
        bench.request(f"r{number}", prompt_of(seed, length), 3, remote=False)
        for _ in range(turns):
            bench.loop.turn(0.0)
    bench.finish()
    assert not [name for name, times in computed.items() if times > BLOCK]
    for name, (prompt, max_tokens) in bench.prompts.items():
        assert bench.tokens(name) == expected(prompt, max_tokens)


def test_blocks_of_an_ended_sequence_are_held_until_its_last_step_is_read():
    """Guards against reuse under a running step, here with a pool in which the blocks are needed at once."""
    bench = Bench(1, 12)
    bench.request("a", [1, 2, 3], 8, remote=False)
    for _ in range(4):
        bench.loop.turn(0.0)
    bench.cancel("a")
    held = bench.manager.usage().owned
    bench.hear()
    assert not bench.role.sequences and bench.runner.launched
    assert bench.manager.usage().owned == held > 0
    bench.finish()


def test_the_next_step_is_launched_before_the_last_one_is_read():
    """Guards against a loop that waits for the tokens of a step before it launches the next."""
    bench = Bench(1, 12)
    bench.request("a", [1, 2, 3], 8, remote=False)
    bench.loop.turn(0.0)  # admitted
    under_way = []
    while bench.loop.turn(0.0):
        under_way.append(len(bench.runner.launched))
    assert set(under_way[:-1]) == {1}
    assert bench.tokens("a") == expected([1, 2, 3], 8)


def test_a_request_before_the_next_launch_is_in_the_next_step():
    """Guards against a step launched so early that a new request waits behind it."""
    bench = Bench(1, 30)
    bench.request("a", [1, 2, 3], 20, remote=False)
    for _ in range(3):
        bench.loop.turn(0.0)
    under_way = len(bench.runner.launched)
    bench.role._timer.launch_at = bench.parts.clock() + 100.0
    assert under_way == 1 and 0.05 < bench.loop.wait_s(0.1) <= 0.1
    bench.request("b", [4, 5], 5, remote=True)
    bench.hear()
    bench.arrive()
    assert not bench.loop.turn(0.0) and len(bench.runner.launched) == under_way
    bench.role._timer.launch_at = 0.0
    bench.loop.turn(0.0)
    bench.finish()
    assert bench.tokens("a") == expected([1, 2, 3], 20)
    assert bench.tokens("b") == expected([4, 5], 5)


def test_a_step_with_a_prompt_is_launched_at_once():
    """Guards against an idle device during a launch kernel by kernel, which takes as long as a step."""
    bench = Bench(1, 30, max_chunk_tokens=4)
    bench.request("a", [1, 2, 3], 20, remote=False)
    for _ in range(3):
        bench.loop.turn(0.0)
    bench.role._timer.launch_at = bench.parts.clock() + 100.0
    bench.request("b", list(range(11)), 5, remote=False)
    lengths = []
    for _ in range(9):
        bench.loop.turn(0.0)
        lengths += [row.num_new for step in bench.runner.launched[-1:] for row in step._rows if row.num_new > 1]
    assert [*dict.fromkeys(lengths)] == [4, 3]  # chunks of 4, 4 and 3, then the launch waits again
    assert len(bench.runner.launched) == 1 and bench.loop.wait_s(0.1) > 0.05
    bench.role._timer.launch_at = 0.0
    bench.finish()
    assert bench.tokens("b") == expected(list(range(11)), 5)


def test_a_prompt_that_does_not_fit_keeps_the_launch_late():
    """Guards the late launch when blocks are short: an early one makes new requests wait for another step."""
    bench = Bench(1, 7)
    bench.request("a", list(range(5)), 12, remote=False)
    for _ in range(4):
        bench.loop.turn(0.0)
    bench.request("b", [7] * 22, 5, remote=False)
    bench.loop.turn(0.0)  # it makes only the next step launch early
    bench.loop.turn(0.0)
    under_way, bench.role._timer.launch_at = len(bench.runner.launched), bench.parts.clock() + 100.0
    assert bench.role._queues.waiting and not any(bench.loop.turn(0.0) for _ in range(5))
    assert len(bench.runner.launched) == under_way == 1
    bench.role._timer.launch_at = 0.0
    bench.finish()
    assert bench.tokens("b") == expected([7] * 22, 5)


def test_the_gate_measures_device_time():
    """Guards the choice between loading and computing: the measured speed excludes the wait for the previous step."""
    bench = Bench(1, 30)
    bench.request("a", list(range(12)), 4, remote=False)
    measured = []
    bench.parts.prefixes.gate.computed = lambda num_tokens, spent_s, now: measured.append((num_tokens, spent_s))
    for _ in range(9):
        for step in bench.runner.launched:
            step.device_time = DeviceTime(0.25, 0.0)
        bench.role._timer.launch_at = 0.0
        bench.loop.turn(0.0)
    assert measured == [(12, 0.25)]


def test_steps_that_waited_for_masks_are_counted():
    """Guards the metric that says whether masks hold up the GPU: those that came in time do not count."""
    bench = Bench(1, 30)
    bench.request("a", [1, 2, 3], 4, remote=False)
    waits = iter((0.0, 30e-6, 0.002, 0.001))
    while bench.loop.turn(0.0) or bench.runner.launched:
        for step in bench.runner.launched:
            step.device_time = step.device_time or DeviceTime(0.004, 0.0, next(waits, 0.0))
        bench.role._timer.launch_at = 0.0
    counters = bench.role.counters
    assert counters.grammar_late_steps == 2 and counters.grammar_late_seconds == pytest.approx(0.003)


def test_gaps_are_counted_between_consecutive_steps_only():
    """Guards the gap metric against the pauses of an idle worker."""
    bench = Bench(1, 30)
    bench.request("a", [1, 2, 3], 4, remote=False)
    gaps = iter((30.0, 20e-6, 90e-6, 10.0))
    while bench.loop.turn(0.0) or bench.runner.launched:
        for step in bench.runner.launched:
            step.device_time = step.device_time or DeviceTime(0.004, next(gaps, 0.0))
        bench.role._timer.launch_at = 0.0
    counters = bench.role.counters
    assert counters.steps == 4 and counters.device_busy_seconds == pytest.approx(4 * 0.004)
    assert (counters.device_gaps, counters.device_gaps_short) == (3, 1)
    assert counters.device_gap_seconds == pytest.approx(20e-6 + 90e-6 + 10.0)
