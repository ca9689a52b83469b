"""The GPU's sampler, its kernels interpreted where there is no GPU, token for token against models.sampler's."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.kernels.triton import sampling_rows as columns
from baton.models.batch import Draw
from baton.models.cpu.sampler import draw_tokens
from baton.models.cuda.queue import CudaQueue, Queue
from baton.models.cuda.slots import SlotSampler
from baton.models.sampling_rules import rules_of
from baton.node.messages import control
from baton.node.messages.control import SamplingSpec
from baton.testing.late_queue import LateQueue

VOCAB = 5000  # two blocks of tokens
SLOTS = 4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(num_slots: int = SLOTS, vocab_size: int = VOCAB) -> tuple[Queue, SlotSampler]:
    queue: Queue = CudaQueue(0) if torch.cuda.is_available() else LateQueue()
    return queue, SlotSampler(queue, num_slots, num_slots, vocab_size)


def run(queue: Queue) -> None:
    queue.mark().wait()


def drawn(
    sampler: SlotSampler, queue: Queue, logits: torch.Tensor, slots: list[int], positions: list[int]
) -> list[int]:
    sampler.flush()
    run(queue)
    out = as_int32([-1] * len(slots))
    sampler.draw_edited(logits.clone().to(DEVICE), as_int32(slots), as_int32(positions), out)
    return out.tolist()


def as_int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def draw_of(sampling: SamplingSpec, prompt: list[int], output: list[int]) -> Draw:
    return Draw(sampling, (*prompt, *output), len(prompt), len(output))


TOKENS = st.integers(0, VOCAB + 50)  # some are none of the model's
PROMPTS = st.lists(st.integers(0, 40), min_size=1, max_size=12)


@st.composite
def params(draw) -> SamplingSpec:
    penalised = draw(st.booleans())
    fields = {
        "temperature": draw(st.sampled_from([0.0, 0.3, 1.0, 1.7])),
        "top_k": draw(st.sampled_from([0, 0, 1, 5, 400, VOCAB - 1, VOCAB, 10 * VOCAB])),
        "top_p": draw(st.sampled_from([1.0, 1.0, 0.031, 0.52, 0.917, 0.9993])),
        "min_p": draw(st.sampled_from([0.0, 0.0, 0.013, 0.4, 1.0])),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "min_tokens": draw(st.integers(0, 4)),
        "stop_token_ids": tuple(draw(st.lists(st.integers(0, 40), max_size=20))),
        "logit_bias": tuple(draw(st.lists(st.tuples(TOKENS, st.floats(-9, 9, width=32)), max_size=4))),
        "allowed_token_ids": tuple(draw(st.lists(TOKENS, max_size=30, unique=True))) if draw(st.booleans()) else (),
        "bad_words": tuple(draw(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple), max_size=9))),
        "repetition_penalty": draw(st.sampled_from([0.7, 1.0, 1.3])) if penalised else 1.0,
        "frequency_penalty": draw(st.sampled_from([-1.1, 0.0, 0.37])) if penalised else 0.0,
        "presence_penalty": draw(st.sampled_from([0.0, 1.9])) if penalised else 0.0,
    }
    return SamplingSpec(max_tokens=99, **fields)


def equal_or_near(logits: torch.Tensor, draws: list[Draw], positions: list[int], found: list[int]) -> None:
    """The CPU's tokens, or where a rounding decides, those that it draws with a top_p a hair wider or narrower."""
    expected = [each.token_ids[0] for each in draw_tokens(logits.clone(), draws, positions)]
    for row, draw in enumerate(draws):
        allowed = {expected[row]}
        for factor in (1 - 1e-5, 1 + 1e-5):
            top_p = min(1.0, draw.sampling.top_p * factor) if draw.sampling.top_p < 1.0 else 1.0
            fields = {name: getattr(draw.sampling, name) for name in draw.sampling.__struct_fields__}
            other = Draw(SamplingSpec(**(fields | {"top_p": top_p})), draw.history, draw.prompt_len, draw.num_generated)
            (again,) = draw_tokens(logits[row : row + 1].clone(), [other], [positions[row]])
            allowed.add(again.token_ids[0])
        assert found[row] in allowed, (row, draw.sampling, found[row], expected[row])


@settings(max_examples=6, derandomize=True)  # seconds each, and a rounding may decide a draw once in 10**5
@given(st.lists(st.tuples(params(), PROMPTS, PROMPTS), min_size=2, max_size=SLOTS), st.integers(0, 999))
def test_every_parameter_draws_the_cpu_s_token(rows, seed):
    """Guards the order of edits and filters, their exact thresholds, and a row against the rows around it."""
    queue, sampler = make()
    scale = torch.tensor([8.0, 3.0, 0.2, 1.0])[: len(rows), None]
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed)) * scale
    draws = [draw_of(*row) for row in rows]
    slots = list(range(len(rows)))[::-1]
    for slot, draw in zip(slots, draws, strict=True):
        sampler.set_row(slot, draw)
    positions = [len(draw.history) for draw in draws]
    equal_or_near(logits, draws, positions, drawn(sampler, queue, logits, slots, positions))


def test_counts_and_minimum_advance_on_the_device():
    """Guards penalties that do not see what was drawn since set_row, and stops that stay forbidden."""
    queue, sampler = make(2, 60)
    sampling = SamplingSpec(
        max_tokens=99, temperature=1.3, seed=3, frequency_penalty=1.5, repetition_penalty=4.0, presence_penalty=0.5,
        min_tokens=4, stop_token_ids=tuple(range(50)), top_k=30,
    )  # fmt: skip
    logits = torch.randn(1, 60, generator=torch.Generator().manual_seed(0)) * 2
    prompt, output = logits[0].topk(8).indices.tolist() + [55, 57], []  # what would be drawn but for the repetition
    sampler.set_row(1, draw_of(sampling, prompt, output))
    for _ in range(7):
        position = len(prompt) + len(output)
        (expected,) = draw_tokens(logits.clone(), [draw_of(sampling, prompt, output)], [position])
        assert drawn(sampler, queue, logits, [1], [position]) == [expected.token_ids[0]]
        output.append(expected.token_ids[0])
    assert min(output[:4]) >= 50 > min(output[4:]), output


def test_last_tokens_advance_on_the_device():
    """Guards bad words against tokens that only the device has yet, those of another word, and those of the prompt; of
    the longest word all tokens count, over positions where the ring of last tokens begins anew."""
    queue, sampler = make(2, 60)
    logits, most = torch.zeros(1, 60), columns.MAX_BAD_WORD_TOKENS
    logits[0, :4] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    words = ((2, 0), (0, 0, 0, 0), (1, 2), (9, *([5] * (most - 1))), (3,))
    sampling = SamplingSpec(max_tokens=99, temperature=0.0, bad_words=words)
    for prompt, output in (([2], []), ([0, 0, 0], [0]), ([7] * 90, [0, 0, 0]), ([7], [1] * 40)):
        sampler.set_row(1, draw_of(sampling, prompt, output))
        for _ in range(9):
            position = len(prompt) + len(output)
            (expected,) = draw_tokens(logits.clone(), [draw_of(sampling, prompt, output)], [position])
            assert drawn(sampler, queue, logits, [1], [position]) == [expected.token_ids[0]]
            output.append(expected.token_ids[0])
        assert set(output[-9:]) == {0, 1}, output
    longest = [9] + [5] * (most - 2)
    logits[0, 5] = 9.0
    for before, expected_id in ((longest, 0), ([8, *longest[1:]], 5), (longest[1:], 5)):
        sampler.set_row(0, draw_of(sampling, [1] * 41, [7] * 40 + before))
        assert drawn(sampler, queue, logits, [0], [81 + len(before)]) == [expected_id]


def test_limits_of_lists_are_those_of_the_messages():
    """Guards a slot's arrays against a request that has more than they hold."""
    assert (columns.MAX_BAD_WORDS, columns.MAX_BAD_WORD_TOKENS) == (control.MAX_BAD_WORDS, control.MAX_BAD_WORD_TOKENS)


@pytest.mark.parametrize("vocab_size", [7, 33, VOCAB])
def test_only_allowed_tokens_are_drawn(vocab_size):
    """Guards the bits of the mask at the ends of its words, a slot's mask against its next owner, and greedy rows."""
    queue, sampler = make(1, vocab_size)
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(2))
    for token in {0, 6, 31 % vocab_size, 32 % vocab_size, vocab_size - 1}:
        for temperature in (0.0, 1.5):
            sampling = SamplingSpec(max_tokens=9, temperature=temperature, allowed_token_ids=(token, vocab_size + 3))
            sampler.set_row(0, draw_of(sampling, [1], []))
            assert drawn(sampler, queue, logits, [0], [1]) == [token]


def test_a_slot_forgets_the_row_before():
    """Guards a slot's next owner against counts, bias and filters of the last."""
    queue, sampler = make(1, 60)
    logits = torch.randn(1, 60, generator=torch.Generator().manual_seed(1))
    heavy = SamplingSpec(max_tokens=9, temperature=0.0, logit_bias=((7, 99.0),), presence_penalty=1.0)
    sampler.set_row(0, draw_of(heavy, [1], [7, 7]))
    assert sampler.edits(0) and drawn(sampler, queue, logits, [0], [3]) == [7]
    sampler.set_row(0, draw_of(SamplingSpec(max_tokens=9, temperature=0.0), [1], []))
    assert not sampler.edits(0) and drawn(sampler, queue, logits, [0], [1]) == [int(logits.argmax())]


def test_plain_and_edited_ways_draw_the_same():
    """Guards a plain row whose token changes when a neighbour makes the step go the other way."""
    queue, sampler = make(3, VOCAB)
    for slot, temperature in enumerate((0.0, 0.8, 1.5)):
        sampling = SamplingSpec(max_tokens=9, temperature=temperature, seed=(9 << 40) + slot)
        sampler.set_row(slot, draw_of(sampling, [1], []))
        assert not rules_of(sampling, VOCAB).needs_more_than_temperature
    sampler.flush()
    run(queue)
    logits, slots = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(2)), as_int32([2, 0, 1])
    outs = [as_int32([0, 0, 0]) for _ in range(2)]
    logits = logits.to(DEVICE)
    sampler.draw(logits, slots, as_int32([5, 6, 7]), outs[0])
    sampler.draw_edited(logits, slots, as_int32([5, 6, 7]), outs[1])
    assert torch.equal(*outs)


@pytest.mark.parametrize("vocab_size", [7, VOCAB])
def test_logprobs_equal_the_cpu_s(vocab_size):
    """Guards log probabilities of edited logits, of another row, and likeliest tokens out of order."""
    queue, sampler = make(3, vocab_size)
    wants = (None, 0, 20)
    draws = [
        draw_of(
            SamplingSpec(
                max_tokens=9, temperature=0.0, logprobs=wanted is not None, top_logprobs=wanted or 0,
                logit_bias=((3, 50.0),),
            ),
            [1],
            [],
        )
        for wanted in wants
    ]  # fmt: skip
    for slot, draw in enumerate(draws):
        sampler.set_row(slot, draw)
    logits = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(4)) * 3
    tokens = drawn(sampler, queue, logits, [0, 1, 2], [1, 1, 1])
    assert tokens == [3, 3, 3] and [sampler.num_top(slot) for slot in range(3)] == [None, 0, min(20, vocab_size)]
    sampler.logprobs(logits.to(DEVICE), as_int32([0, 1, 2]), as_int32(tokens))
    for row, expected in list(enumerate(draw_tokens(logits.clone(), draws, [1, 1, 1])))[1:]:
        assert expected.logprobs
        assert float(sampler.found.drawn[row]) == pytest.approx(expected.logprobs[0].logprob, abs=2e-5)
        count = len(expected.logprobs[0].top)
        assert sampler.found.top_ids[row, :count].tolist() == [token for token, _ in expected.logprobs[0].top]
        values = [value for _, value in expected.logprobs[0].top]
        assert sampler.found.top[row, :count].tolist() == pytest.approx(values, abs=2e-5)


def test_top_k_keeps_equals_of_the_last():
    """Guards against a search that stops one value short: ties of the last kept are all possible, no other token."""
    count = 10
    queue, sampler = make(count, 64)
    logits = torch.zeros(count, 64)
    logits[:, [3, 9, 11]] = torch.tensor([2.0, 1.5, 1.5])
    for slot in range(count):
        sampler.set_row(slot, draw_of(SamplingSpec(max_tokens=9, temperature=1.0, top_k=2, seed=slot), [1], []))
    assert set(drawn(sampler, queue, logits, list(range(count)), [1] * count)) == {3, 9, 11}
