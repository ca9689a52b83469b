"""Speculation with the demo model in this process: whatever proposes drafts, the tokens are those of steps without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from baton.models.batch import Draw
from baton.models.drafts import Drafts
from baton.node.messages.control import SamplingSpec
from baton.tests.unit.worker.demo_worker import Answer, DemoWorker

PROMPT = [2, *range(300, 340), *range(300, 330)]
REQUESTS: dict[str, SamplingSpec] = {
    "greedy": SamplingSpec(max_tokens=60, temperature=0.0),
    "stops": SamplingSpec(max_tokens=28, temperature=0.0, stop_token_ids=tuple(range(0, 900, 7)), min_tokens=9),
    "seeded": SamplingSpec(max_tokens=60, temperature=0.9, seed=7),
    "filtered": SamplingSpec(max_tokens=60, temperature=1.2, seed=8, top_k=40, top_p=0.9, min_p=0.01),
    "biased": SamplingSpec(max_tokens=28, temperature=0.7, seed=9, logit_bias=((305, 3.0),)),
    "penalised": SamplingSpec(max_tokens=20, temperature=0.8, seed=1, frequency_penalty=0.7, bad_words=((310, 311),)),
    "named": SamplingSpec(max_tokens=20, temperature=0.8, seed=2, logprobs=True, top_logprobs=2),
    "one": SamplingSpec(max_tokens=1, temperature=0.8, seed=2),
}


class Recorded:
    """Drafts what the sequence goes on with, as it was recorded; `skill` tokens of them, and wrong ones behind."""

    def __init__(self, answers: Mapping[str, Answer], skill: int) -> None:
        self._ids = {sampling: answers[name].ids for name, sampling in REQUESTS.items()}
        self._skill = skill

    def propose(self, draw: Draw, most: int) -> Drafts:
        coming = self._ids[draw.sampling][draw.num_generated : draw.num_generated + most]
        return Drafts((*coming[: self._skill], *((token + 1) % 900 for token in coming[self._skill :])))


@pytest.fixture(scope="module")
def off() -> dict[str, Answer]:
    return DemoWorker(400).answers(REQUESTS, PROMPT)


@pytest.mark.parametrize(
    ("drafts", "num_blocks"),
    [("ngram", 400), ("oracle", 400), ("oracle", 12), ("half right", 12), ("adversarial", 400)],
)
def test_tokens_with_and_without_drafts_are_the_same(off, drafts, num_blocks):
    """Guards against a draft that is accepted though another token is drawn, against noise of another position, and
    against KV of rejected drafts in a cached prefix: all requests share one, and those of good drafts run once more."""
    skill = {"ngram": None, "oracle": 99, "half right": 2, "adversarial": 0}[drafts]
    drafter = None if skill is None else Recorded(off, skill)
    worker = DemoWorker(num_blocks, drafter=drafter, speculate="ngram", speculate_tokens=5)
    for _ in range(2 if (skill, num_blocks) == (99, 400) else 1):
        assert worker.answers(REQUESTS, PROMPT) == off
    counters = worker.role.counters
    assert (counters.preemptions > 0) == (num_blocks == 12)
    assert counters.spec_decode_num_drafts > 0
    if skill == 0:
        assert counters.spec_decode_num_accepted_tokens == 0
    if skill == 99:
        assert counters.spec_decode_num_accepted_tokens == counters.spec_decode_num_draft_tokens
    if (skill, num_blocks) == (99, 400):
        assert counters.spec_decode_num_accepted_tokens > 4 * counters.spec_decode_num_drafts


def test_another_worker_continues_and_a_prediction_is_used(off):
    """Guards against tokens that depend on where a worker died, with drafts in flight, and against predictions that are
    not looked at or not counted."""
    requests = {name: sampling for name, sampling in REQUESTS.items() if name in ("greedy", "seeded", "filtered")}
    known = {name: off[name].ids[:cut] for name, cut in (("greedy", 1), ("seeded", 9), ("filtered", 20))}
    worker = DemoWorker(100, speculate="ngram", speculate_tokens=5)
    found = worker.answers(requests, PROMPT, known, prediction=off["seeded"].ids)
    assert {name: (*known[name], *answer.ids) for name, answer in found.items()} == {
        name: off[name].ids for name in requests
    }
    counters = worker.role.counters
    assert 30 < worker.accepted_prediction <= counters.spec_decode_num_accepted_tokens


def test_a_sequence_whose_drafts_are_never_accepted_has_few():
    """Guards against a request that pays for useless drafts at each step."""
    requests = {"greedy": SamplingSpec(max_tokens=48, temperature=0.0)}
    answers = DemoWorker(100).answers(requests, PROMPT)
    worker = DemoWorker(100, drafter=Always((5,)), speculate="ngram", speculate_tokens=4)
    take_in, cooled = worker.role.take_in, set()

    def look(*step: Any) -> None:
        take_in(*step)
        worker.role.report()
        cooled.add(worker.role.counters.spec_decode_cooled_sequences)

    worker.role.take_in = look  # type: ignore[method-assign]
    assert worker.answers(requests, PROMPT) == answers
    assert cooled == {0, 1}
    assert 16 <= worker.role.counters.spec_decode_num_drafts <= 16 + 32 // 8 + 1


class Always:
    """The same drafts at each step."""

    def __init__(self, token_ids: tuple[int, ...]) -> None:
        self._token_ids = token_ids

    def propose(self, draw: Draw, most: int) -> Drafts:
        return Drafts(self._token_ids[:most])
