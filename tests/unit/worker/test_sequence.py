"""worker.sequence: rows, positions and messages of one sequence, with steps that run ahead of the host."""

from __future__ import annotations

import pytest

from baton.kvtransfer.blocks.manager import BlockManager
from baton.node.leg import LegKey
from baton.node.messages.control import Cancel, Logprob, SamplingSpec, Stages
from baton.tests.unit.worker.bench import reserve, sequence_of
from baton.worker.sequence import Sequence, cancel_matches


def launch(sequence: Sequence, length: int) -> None:
    """The effect of a launch on the sequence."""
    drawing = sequence.row(length).draw is not None
    sequence.num_launched += length
    sequence.num_pending += drawing


@pytest.fixture
def sequence() -> Sequence:
    return sequence_of(BlockManager(8))


def test_a_new_sequence_holds_nothing() -> None:
    """Guards migration: tokens of an earlier attempt are known and already sent."""
    manager = BlockManager(8)
    sequence = sequence_of(manager, "a", 9, attempt=2, prompt_len=6, priority=3, deadline_s=5.0, at=1.5, link="proxy 2")
    assert (sequence.leg, sequence.link, sequence.priority) == (LegKey("a", 2), "proxy 2", 3)
    assert (sequence.num_tokens, sequence.num_generated, sequence.num_sent) == (9, 3, 3)
    assert (sequence.deadline, sequence.times.received_at) == (5.0, 1.5)
    assert manager.num_available == 8 and not sequence.table.blocks


def test_only_the_row_with_the_last_known_token_samples(sequence: Sequence) -> None:
    """Guards chunks: a token sampled in the middle of a prompt is not part of the answer."""
    row = sequence.row(4)
    assert (row.token_ids, row.start, row.draw) == ([0, 1, 2, 3], 0, None)
    launch(sequence, 4)
    row = sequence.row(2)
    assert (row.token_ids, row.start) == ([4, 5], 4)
    assert row.draw is not None and (row.draw.prompt_len, row.draw.num_generated) == (6, 0)


def test_a_row_behind_a_pending_token_has_a_position_and_no_token(sequence: Sequence) -> None:
    """Guards run-ahead: the position of an unread token is known, its id is not."""
    launch(sequence, 6)
    assert (sequence.num_expected, sequence.num_tokens) == (7, 6)
    row = sequence.row(1)
    assert (list(row.token_ids), row.start, row.num_new) == ([], 6, 1)
    assert row.draw is not None and row.draw.num_generated == 1
    launch(sequence, 1)
    assert sequence.row(1).start == 7 and sequence.num_expected == 8


def test_tokens_are_sent_once_and_in_order(sequence: Sequence) -> None:
    """Guards the index, by which the proxy detects duplicates and gaps."""
    sequence.cached_tokens = 99
    sequence.append(40, Logprob(-1.0))
    sequence.append(41, Logprob(-2.0))
    message = sequence.unsent_tokens("", Stages(queue_s=1.0))
    assert (message.request_id, message.attempt, message.index, message.ids) == ("a", 0, 0, (40, 41))
    assert [each.logprob for each in message.logprobs] == [-1.0, -2.0]
    assert message.cached_tokens == 6, "generated tokens are no prompt"
    sequence.append(42, None)
    message = sequence.unsent_tokens("stop", None)
    assert (message.index, message.ids, message.logprobs, message.finish) == (2, (42,), (), "stop")


def test_preemption_resets_the_launched_count(sequence: Sequence) -> None:
    """Guards recompute: after preemption, computing restarts at the first token."""
    launch(sequence, 4)
    sequence.restart(0)
    assert (sequence.num_computed, sequence.num_launched) == (0, 0)
    assert sequence.row(6).start == 0


def test_a_repeated_prompt_takes_its_sampling_from_its_own_message() -> None:
    """Guards against sampling with another request's parameters."""
    manager = BlockManager(8)
    greedy = sequence_of(manager, "a", sampling=SamplingSpec(max_tokens=1, temperature=0.0))
    warm = sequence_of(manager, "b", sampling=SamplingSpec(max_tokens=1, seed=7))
    one, other = greedy.row(6).draw, warm.row(6).draw
    assert one is not None and other is not None
    assert (one.sampling.temperature, other.sampling.seed) == (0.0, 7)


@pytest.mark.parametrize(("request_id", "attempt", "matches"), [("a", 1, True), ("a", 0, False), ("b", 9, False)])
def test_a_cancel_matches_its_request_up_to_its_attempt(request_id: str, attempt: int, matches: bool) -> None:
    """Guards attempts that began after the Cancel was sent, and other requests."""
    leg = LegKey("a", 1)
    assert cancel_matches(Cancel(request_id=request_id, attempt=attempt), leg) is matches


def test_the_benchs_default_request_is_valid() -> None:
    """Guards the tests of this folder: their default request fits its own block hashes."""
    message = reserve().message
    assert len(message.body.block_hashes) == 1  # type: ignore[union-attr]
