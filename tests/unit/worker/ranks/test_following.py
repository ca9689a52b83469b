"""Ranks on GPUs launch what rank 0 launches, and read it no later than they have to."""

from __future__ import annotations

import numpy as np

from baton.models.batch import Draw, PromptTargets, Row
from baton.models.cuda.draft_budget import BudgetChoice
from baton.node.messages.control import Grammar, SamplingSpec
from baton.worker.ranks.device_records import StepBegun, decode_record, encode_step
from baton.worker.ranks.following import Follower, LeadingRunner

SPEC = SamplingSpec(max_tokens=9, temperature=0.7, seed=1 << 62, frequency_penalty=0.5, logit_bias=((3, 1.5),))
MASKED = SamplingSpec(max_tokens=9, grammar=Grammar(text="start: /.*/", end_ids=(0,)))


class Recorder:
    """A runner that notes what is done with its steps, with up to two in flight."""

    config = None
    run_ahead = 1

    def __init__(self) -> None:
        self.done: list[tuple] = []

    def choose(self, rows):
        return BudgetChoice(len(rows) + 3, 0.5, tuple(row.slot for row in rows), proposes=False)

    def launch_chosen(self, rows, choice):
        assert choice == self.choose(rows)
        self.done.append(("launch", [tuple(row.token_ids) for row in rows]))
        return RecordedStep(self, len([each for each in self.done if each[0] == "launch"]))


class RecordedStep:
    device_time = None

    def __init__(self, runner: Recorder, number: int) -> None:
        self._runner, self._number, self.prompt_logprobs = runner, number, {}

    def complete(self, masks: np.ndarray) -> None:
        self._runner.done.append(("complete", self._number, masks.tolist()))

    def read(self):
        self._runner.done.append(("read", self._number))
        return []


def test_a_record_has_what_a_rank_draws_with():
    """Guards against ranks that draw different tokens: a history, a parameter or a slot that is left out; and against
    histories that are sent with every step."""
    begun = Row([7, 8], 0, [4, 5], Draw(SPEC, [1, 7, 8], 2, 0, (9,)), 3, PromptTargets(1, [3], 2))
    going = Row([], 33, (4, 5, 6), Draw(SPEC, list(range(33)), 2, 31), 3)
    found = decode_record(encode_step([begun, going, Row((1,), 0, (2,), None, 1)]))
    assert isinstance(found, StepBegun)
    first, second, third = found.rows
    assert first.draw.sampling == SPEC and list(first.draw.history) == [1, 7, 8] and list(first.draw.prediction) == [9]
    assert (list(first.token_ids), first.start, list(first.blocks), first.slot) == ([7, 8], 0, [4, 5], 3)
    assert list(first.targets.token_ids) == [3] and (first.draw.prompt_len, first.draw.num_generated) == (2, 0)
    assert second.draw.sampling == SPEC and second.draw.history == range(33) and (second.start, second.slot) == (33, 3)
    assert third.draw is None and list(third.token_ids) == [1]


def test_others_do_what_rank_0_does():
    """Guards against a rank that has more steps in flight than it has memory for, masks of another step, and a step in
    which ranks verify other numbers of drafts."""
    own, other = Recorder(), Recorder()
    follower = Follower(other.launch_chosen, other.run_ahead)
    leader = LeadingRunner(own, follower.take)
    steps = [leader.launch([Row([number], 0, [0], None)]) for number in range(2)]
    steps[0].read()
    steps.append(leader.launch([Row([2], 0, [0], Draw(MASKED, (), 1, 0))]))
    steps[1].read()
    steps[2].complete(np.array([[5, -1]], dtype=np.int32))
    steps[2].read()
    leader.launch([Row([3], 0, [0], None)])
    launches = [("launch", [(number,)]) for number in range(4)]
    masks = ("complete", 3, [[5, -1]])
    assert own.done == [*launches[:2], ("read", 1), launches[2], ("read", 2), masks, ("read", 3), launches[3]]
    assert other.done == [*launches[:2], ("read", 1), launches[2], ("read", 2), masks, launches[3]]
