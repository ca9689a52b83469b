"""Past answers as a source of drafts: found by prompts that begin alike and share the cache's identity, and bounded."""

from __future__ import annotations

import pytest

from baton.kvtransfer.blocks.hashing import block_hashes
from baton.node.messages.control import SamplingSpec
from baton.tests.unit.worker.demo_worker import DemoWorker
from baton.worker.past_answers import MAX_ALIKE, PastAnswers

OWN, OTHER = b"o" * 32, b"t" * 32
PROMPT = [2, *range(300, 340)]


def names(prompt: list[int], root: bytes = OWN) -> tuple[bytes, ...]:
    return tuple(block_hashes(root, tuple(prompt), 16))


def test_answers_are_those_of_the_longest_common_prefix():
    """Guards against an answer to another question before one to the same, and the oldest before the newest."""
    answers = PastAnswers(most_tokens=6)
    answers.add(names([*PROMPT[:16], *range(50, 90)]), [1, 1])
    answers.add(names(PROMPT), [2, 2, 2])
    answers.add(names(PROMPT), [3, 3, 3, 3, 3, 3, 3])
    answers.add(names(PROMPT), [4])
    assert answers.similar(names([*PROMPT, *range(20)])) == (4,)  # the next has no room beside it
    assert answers.similar(names([*PROMPT[:16], *range(500, 540)])) == (4,)
    assert answers.similar(names([*PROMPT[:16], *range(50, 90)])) == (1, 1)
    assert answers.similar(names(PROMPT[:10])) == answers.similar(names([5] * 40)) == ()


def test_memory_is_bounded():
    """Guards against names and answers that stay for ever, and many answers by one name."""
    answers = PastAnswers(most_tokens=100, max_answers=30)
    for number in range(200):
        answers.add(names([*PROMPT[:16], *([number] * 200)]), [number] * 300)
    assert len(answers) == 30
    assert answers.num_names <= 30 * 12 + 1
    assert set(answers.similar(names(PROMPT[:16]))) == {199}
    answers.add(names(PROMPT[:16]), [7])
    for number in range(3 * MAX_ALIKE):
        answers.add(names(PROMPT[:16]), [number])
    assert answers.similar(names(PROMPT[:16])) == tuple(range(2 * MAX_ALIKE, 3 * MAX_ALIKE))


@pytest.mark.parametrize("root", [OWN, OTHER])
def test_an_answer_is_a_source_for_its_own_namespace_alone(root):
    """Guards against tokens of one tenant's answers that are proposed, and seen by their time, in another's."""
    requests = {"seeded": SamplingSpec(max_tokens=40, temperature=0.9, seed=7)}
    worker = DemoWorker(100, speculate="ngram", speculate_tokens=5)
    first = worker.answers(requests, PROMPT, root=OWN)
    counters = worker.role.counters
    worker.role.report()
    before = counters.spec_decode_accepted_answers
    assert worker.answers(requests, PROMPT, root=root) == first
    worker.role.report()
    assert (counters.spec_decode_accepted_answers - before > 20) == (root == OWN)
    assert root == OWN or counters.spec_decode_accepted_answers == before == 0
