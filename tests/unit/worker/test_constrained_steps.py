"""Sequences with grammars through the loop and both roles: masks come after the step before was read, never before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from baton.decode.role import DecodeRole
from baton.decode.settings import DecodeSettings
from baton.kvtransfer.blocks.manager import BlockManager
from baton.kvtransfer.protocol.events import KvArrived
from baton.models.batch import Drawn, Row
from baton.node.counters import GrammarCounters
from baton.node.messages.control import Bundle, Cancel, Failed, Grammar, Prefill, SamplingSpec, Tokens
from baton.prefill.role import PrefillRole
from baton.prefill.settings import PrefillSettings
from baton.tests.unit.worker.bench import RecordingIo, parts_of, reserve
from baton.worker.constraint import Constraint, GrammarCompiled
from baton.worker.io_thread import FromProxy
from baton.worker.loop import Loop

GRAMMAR = Grammar(text="start: count", end_ids=(1,))
COUNTED = SamplingSpec(max_tokens=5, grammar=GRAMMAR)
FREE = 7
VOCAB = 1000


class Counter:
    """A matcher of 100, 101, 102 ..."""

    def __init__(self) -> None:
        self.next = 100

    def consume_token(self, token_id: int) -> bool:
        allowed = token_id == self.next
        self.next += 1
        return allowed

    def compute_ff_tokens(self) -> list[int]:
        return []

    def is_accepting(self) -> bool:
        return False

    def is_stopped(self) -> bool:
        return False


class CountingGrammars:
    """Compiles when the test says so."""

    counters = GrammarCounters()

    def __init__(self, *, ready: bool = True) -> None:
        self.ready = ready

    def compile(self, grammar: Grammar) -> Constraint | None:
        return Constraint(grammar, Counter()) if self.ready else None

    def constraint(self, event: GrammarCompiled) -> Constraint | None:
        return self.compile(event.grammar)

    def masks(self, constraints: Sequence[Constraint], drafts: Sequence[Sequence[int]] = ()) -> np.ndarray:
        assert not any(drafts)
        return np.array([[FREE if each.is_broken else each.matcher.next] for each in constraints])  # type: ignore[attr-defined]


class MaskedStep:
    """Draws, in each masked row, what its mask names, and FREE in the others."""

    device_time = None
    prompt_logprobs: Mapping[int, Any] = MappingProxyType({})

    def __init__(self, runner: MaskedRunner, rows: Sequence[Row]) -> None:
        self._runner, self._rows = runner, rows
        self._masks: list[int] | None = None
        self.masked = [row for row in rows if row.draw is not None and row.draw.is_masked]

    @property
    def masked_drafts(self) -> list[tuple[int, ...]]:
        assert self._runner.unread == [self], "looked at while a step before it was not read"
        return [()] * len(self.masked)

    def complete(self, masks: np.ndarray) -> None:
        assert self._runner.unread == [self], "completed while a step before it was not read"
        assert self.masked and self._masks is None
        self._masks = [int(mask[0]) for mask in masks]
        assert len(self._masks) == len(self.masked)

    @property
    def is_open(self) -> bool:
        return bool(self.masked) and self._masks is None

    def read(self) -> list[Drawn | None]:
        assert not self.is_open, "read before its masks were there"
        self._runner.unread.remove(self)
        masks = iter(self._masks or ())
        return [
            None if row.draw is None else Drawn((next(masks) if row.draw.is_masked else FREE,)) for row in self._rows
        ]


class MaskedRunner:
    config = SimpleNamespace(vocab_size=VOCAB)

    def __init__(self, run_ahead: int) -> None:
        self.run_ahead = run_ahead
        self.unread: list[MaskedStep] = []
        self.num_behind = 0

    def launch(self, rows: Sequence[Row]) -> MaskedStep:
        assert not any(step.is_open for step in self.unread), "launched behind a step that waits for masks"
        self.num_behind += bool(self.unread)
        self.unread.append(MaskedStep(self, list(rows)))
        return self.unread[-1]


class Bench:
    def __init__(self, role: str, run_ahead: int, grammars: CountingGrammars, num_blocks: int = 16) -> None:
        self.io, self.runner = RecordingIo(), MaskedRunner(run_ahead)
        self.grammars = grammars
        manager = BlockManager(num_blocks)
        parts = parts_of(self.runner, self.io, manager, lambda: 1000.0, max_model_len=60, grammars=grammars)
        if role == "decode":
            settings = DecodeSettings(spare_blocks=0)
            self.role: Any = DecodeRole(parts, settings.sizes("cpu"), 0)
        else:
            options = PrefillSettings()
            self.role = PrefillRole(parts, options.sizes("cpu"), options.policy)
        self.loop = Loop(parts, self.role, max_waiting=64, drain_s=1.0)

    def deliver(self, *events: Any) -> None:
        for event in events:
            self.io.inbox.put(event)
        self.loop.turn(0.0)

    def run(self) -> None:
        for _ in range(100):
            if not self.loop.turn(0.0):
                break
        self.loop.check()

    def tokens(self, name: str) -> list[int]:
        parts = [tokens for bundle in self.io.of(Bundle) for tokens in bundle.tokens] + self.io.of(Tokens)
        return [token for tokens in parts if tokens.request_id == name for token in tokens.ids]


AHEAD = pytest.mark.parametrize("run_ahead", [0, 1, 2])


@AHEAD
def test_constrained_and_free_rows_share_steps(run_ahead: int) -> None:
    """Guards against a mask that is one token late, one of another row, and a device that idles for free rows."""
    bench = Bench("decode", run_ahead, CountingGrammars())
    bench.deliver(reserve("a", sampling=COUNTED), reserve("b"), reserve("c", sampling=COUNTED))
    bench.run()
    assert [bench.tokens(name) for name in "abc"] == [[100, 101, 102, 103, 104], [FREE] * 5, [100, 101, 102, 103, 104]]
    assert (bench.runner.num_behind > 0) == (run_ahead > 0)


@AHEAD
def test_a_sequence_draws_nothing_before_its_grammar_is_compiled(run_ahead: int) -> None:
    """Guards against a first token that no grammar has seen; others do not wait."""
    bench = Bench("decode", run_ahead, CountingGrammars(ready=False))
    bench.deliver(reserve("a", sampling=COUNTED), reserve("b"))
    bench.run()
    assert (bench.tokens("a"), bench.tokens("b")) == ([], [FREE] * 5)
    bench.grammars.ready = True
    bench.deliver(GrammarCompiled(GRAMMAR))
    bench.run()
    assert bench.tokens("a") == [100, 101, 102, 103, 104]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_grammar_that_cannot_be_compiled_ends_its_requests(role: str) -> None:
    """Guards against a request that waits for ever."""
    bench = Bench(role, 1, CountingGrammars(ready=False))
    request = reserve("a", sampling=COUNTED)
    if role == "prefill":
        body = request.message.body  # type: ignore[union-attr]
        request = FromProxy("proxy", Prefill(request_id="a", attempt=0, body=body, decode="d/1"), 0.0)
    bench.deliver(request)
    bench.deliver(GrammarCompiled(GRAMMAR, "unsupported keyword"))
    bench.run()
    (failed,) = bench.io.of(Failed)
    assert not failed.retryable and failed.reason == "grammar: unsupported keyword"
    assert not bench.role.sequences


@AHEAD
def test_a_replay_continues_behind_the_tokens_it_brings(run_ahead: int) -> None:
    """Guards another attempt after a worker's death: its grammar knows what was generated."""
    bench = Bench("decode", run_ahead, CountingGrammars())
    ids = (0, 1, 2, 3, 100, 101)
    bench.deliver(reserve("a", sampling=COUNTED, token_ids=ids, prompt_len=4, block_hashes=()))
    bench.run()
    assert bench.tokens("a") == [102, 103, 104]


@AHEAD
def test_a_preempted_sequence_keeps_its_place_in_the_grammar(run_ahead: int) -> None:
    """Guards the matcher: computing tokens again does not draw them again."""
    bench = Bench("decode", run_ahead, CountingGrammars(), num_blocks=6)
    sampling = SamplingSpec(max_tokens=12, grammar=GRAMMAR)
    bench.deliver(reserve("a", sampling=sampling), reserve("b", sampling=sampling))
    bench.run()
    assert bench.role.counters.preemptions > 0
    assert bench.tokens("a") == bench.tokens("b") == list(range(100, 112))


@AHEAD
def test_a_cancelled_row_holds_up_no_other(run_ahead: int) -> None:
    bench = Bench("decode", run_ahead, CountingGrammars())
    bench.deliver(reserve("a", sampling=COUNTED), reserve("b", sampling=COUNTED))
    bench.loop.turn(0.0)
    bench.deliver(FromProxy("proxy", Cancel(request_id="a", attempt=0), 0.0))
    bench.run()
    assert bench.tokens("b") == [100, 101, 102, 103, 104]


@pytest.mark.parametrize(("first", "ends"), [(100, False), (500, True)])
def test_decode_checks_the_first_token_of_prefill(first: int, ends: bool) -> None:
    """Guards against an answer whose parts come from two versions of the library."""
    bench = Bench("decode", 1, CountingGrammars())
    bench.deliver(reserve("a", 10, sampling=COUNTED))
    request = reserve("b", 10, sampling=COUNTED)
    message = request.message
    bench.deliver(FromProxy("proxy", type(message)(**{**_fields(message), "prefill": "p/1"}), 0.0))
    (transfer,) = bench.role._reservations.by_transfer
    bench.deliver(KvArrived(transfer, first, None, 0.0, 0.0, 0.0))
    bench.run()
    if ends:
        (failed,) = bench.io.of(Failed)
        assert failed.retryable and failed.request_id == "b"
    else:
        assert bench.tokens("b") == [100, 101, 102, 103, 104]
    assert bench.tokens("a") == [100, 101, 102, 103, 104]


def _fields(message: Any) -> dict[str, Any]:
    return {name: getattr(message, name) for name in message.__struct_fields__}


@AHEAD
def test_prefill_masks_the_first_token(run_ahead: int) -> None:
    """Guards the first token, which prefill draws; a prompt in several chunks draws once."""
    bench = Bench("prefill", run_ahead, CountingGrammars())
    for name, sampling in (("a", COUNTED), ("b", SamplingSpec(max_tokens=5))):
        body = reserve(name, 40, sampling=sampling).message.body  # type: ignore[union-attr]
        bench.deliver(FromProxy("proxy", Prefill(request_id=name, attempt=0, body=body, decode="d/1"), 0.0))
    bench.run()
    assert (bench.tokens("a"), bench.tokens("b")) == ([100], [FREE])
