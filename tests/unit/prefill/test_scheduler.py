"""prefill.scheduler: the budget is respected and used, order is kept, no prompt starves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton.prefill.scheduler import Chunk, QueuedPrompt, ServiceRules, between_tenants, plan, service_order

FCFS, SJF = ServiceRules("fcfs", 4096, 1024), ServiceRules("sjf", 4096, 1024)
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
    sequence = service_order(jobs, FCFS)
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
    assert service_order(jobs, FCFS) == sorted(range(len(jobs)), key=lambda i: (-jobs[i].priority, i))


def test_shortest_first_but_a_long_wait_counts() -> None:
    """Guards both halves of "sjf": short prompts go first, and a long one is not starved by them."""
    long, short = QueuedPrompt(4000, 0, 0, 0.0), QueuedPrompt(100, 0, 0, 0.0)
    assert service_order([long, short], SJF) == [1, 0]
    waited = QueuedPrompt(4000, 0, 0, 4000 / SJF.aging_tokens_s)
    assert service_order([waited, short], SJF) == [0, 1]


def test_between_tenants_a_short_prompt_passes_a_long_one() -> None:
    """Guards a light tenant's prompts against the whole of a heavy one's, also where that has little left; and the long
    prompt against prompts that pass it for ever."""
    rules = between_tenants(FCFS, 40_000)
    long, short = QueuedPrompt(8192, 7000, 0, 0.2), QueuedPrompt(1500, 0, 0, 0.0)
    assert service_order([long, short], rules) == [1, 0] and service_order([long, short], SJF) == [0, 1]
    assert plan([long, short], [1, 0], 4096, rules.max_chunk_tokens, rules.full_step_tokens) == [Chunk(1, 512)]
    assert service_order([QueuedPrompt(8192, 0, 0, 2 * 8192 / 40_000), short], rules) == [0, 1]
    assert service_order([QueuedPrompt(8192, 7000, 1, 0.2), short], rules) == [0, 1], "of higher priority"
    cached = QueuedPrompt(8192, 8000, 0, 0.0, num_cached=8000)
    assert service_order([short, cached], rules) == [1, 0], "what a cache had is no work"


def test_a_device_of_unknown_speed_and_tiny_steps() -> None:
    """Guards long prompts on a worker that has measured nothing yet, and steps of no token."""
    rules = between_tenants(ServiceRules("sjf", 1, 1), 0.0)
    assert (rules.max_chunk_tokens, rules.full_step_tokens, rules.aging_tokens_s) == (1, 1, SJF.aging_tokens_s)
