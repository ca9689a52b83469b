"""prefill.scheduler: the budget is respected and used, order is kept, no prompt starves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton.prefill.scheduler import AGING_TOKENS_PER_S, Chunk, QueuedPrompt, plan, service_order

_work = st.builds(
    lambda tokens, done, priority, age: QueuedPrompt(tokens, min(done, tokens), priority, age),
    st.integers(1, 500),
    st.integers(0, 500),
    st.integers(-2, 2),
    st.floats(0, 100),
)


@given(st.lists(_work, max_size=12), st.integers(1, 600), st.integers(1, 128), st.integers(1, 600))
def test_chunks_fill_the_budget_in_order(jobs: list[QueuedPrompt], budget: int, longest: int, full: int) -> None:
    """Guards against an exceeded or unused budget, gaps in a prompt, and overtaking."""
    sequence = service_order(jobs, "fcfs")
    chunks = plan(jobs, sequence, budget, longest, full)
    lengths = [min(longest, jobs[index].num_tokens - jobs[index].num_computed) for index in sequence]
    first = min(budget, next((length for length in lengths if length), 0))
    assert sum(c.length for c in chunks) == max(first, min(budget, full, sum(lengths)))
    ranks = [sequence.index(c.prompt) for c in chunks]
    assert ranks == sorted(ranks)
    for chunk in chunks:
        assert chunk.length <= jobs[chunk.prompt].num_tokens - jobs[chunk.prompt].num_computed
    if chunks:  # a prompt without a chunk had no work, or came after the budget was used up
        served = {c.prompt for c in chunks}
        last = max(ranks)
        assert all(jobs[i].num_tokens == jobs[i].num_computed for i in sequence[:last] if i not in served)


def test_prompts_share_a_step_only_up_to_a_full_one() -> None:
    """Guards the first of several prompts against a wait for the others, and short ones against steps of their own."""
    long, short = QueuedPrompt(3000, 0, 0, 0.0), QueuedPrompt(400, 0, 0, 0.0)
    assert plan([long, short], [0, 1], 4096, 4096, 1024) == [Chunk(0, 3000)]
    assert plan([short] * 4, range(4), 4096, 4096, 1024) == [Chunk(0, 400), Chunk(1, 400), Chunk(2, 224)]


@given(st.lists(_work, max_size=12))
def test_first_come_first_served_within_a_priority(jobs: list[QueuedPrompt]) -> None:
    """Guards against reordering by anything but priority and arrival."""
    assert service_order(jobs, "fcfs") == sorted(range(len(jobs)), key=lambda i: (-jobs[i].priority, i))


def test_shortest_first_but_a_long_wait_counts() -> None:
    """Guards both halves of "sjf": short prompts go first, and a long one is not starved by them."""
    long, short = QueuedPrompt(4000, 0, 0, 0.0), QueuedPrompt(100, 0, 0, 0.0)
    assert service_order([long, short], "sjf") == [1, 0]
    waited = QueuedPrompt(4000, 0, 0, 4000 / AGING_TOKENS_PER_S)
    assert service_order([waited, short], "sjf") == [0, 1]
