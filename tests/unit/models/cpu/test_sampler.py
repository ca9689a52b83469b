"""Each sampling parameter against a formula of its own in numpy, and the statistics of the draw."""

import math

import numpy as np
import pytest
import torch

from baton.models.batch import Draw
from baton.models.cpu.sampler import draw_tokens
from baton.node.messages.control import SamplingSpec

VOCAB = 53


def params(**fields) -> SamplingSpec:
    return SamplingSpec(**{"max_tokens": 100, "temperature": 0.0, **fields})


def plain(sampling: SamplingSpec, **fields) -> Draw:
    return Draw(**{"sampling": sampling, "history": (), "prompt_len": 0, "num_generated": 0, **fields})


def logits_of(seed: int, rows: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (rows, VOCAB)).astype(np.float32)


def draw(logits: np.ndarray, *draws: Draw, positions=None):
    positions = list(range(len(draws))) if positions is None else positions
    return draw_tokens(torch.from_numpy(logits.copy()), draws, positions)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


def drawn_set(logits: np.ndarray, count: int = 3000, **fields) -> dict[int, int]:
    """How often each token is drawn at `count` positions."""
    sampling = params(**{"temperature": 1.0, "seed": 4, **fields})
    drawn = draw(np.repeat(logits, count, axis=0), *[plain(sampling)] * count)
    ids, counts = np.unique([each.token_ids[0] for each in drawn], return_counts=True)
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))


def chi_square_limit(freedom: int) -> float:
    """The value that chi-square exceeds once in 100,000 times (Wilson and Hilferty's approximation, z = 4.26)."""
    if freedom == 0:  # one possible token: nothing may differ
        return 1e-9
    return freedom * (1 - 2 / (9 * freedom) + 4.26 * math.sqrt(2 / (9 * freedom))) ** 3


def assert_distributed(counts: dict[int, int], expected: np.ndarray) -> None:
    """counts are draws from `expected`; tokens expected less than 8 times are taken together."""
    total = sum(counts.values())
    assert all(expected[token] > 0 for token in counts)
    common = expected * total >= 8
    seen = np.array([counts.get(token, 0) for token in range(len(expected))])
    observed = np.append(seen[common], seen[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum()) * total
    keep = wanted > 1e-9
    chi_square = ((observed - wanted)[keep] ** 2 / wanted[keep]).sum()
    assert chi_square < chi_square_limit(int(keep.sum()) - 1)


def test_greedy_takes_the_largest_and_the_lowest_of_equals():
    logits = logits_of(0, 2)
    logits[1, [40, 7, 22]] = 30.0
    assert [each.token_ids[0] for each in draw(logits, *[plain(params())] * 2)] == [int(logits[0].argmax()), 7]


def test_temperature_too_small_to_divide_by_is_greedy():
    logits = logits_of(1)
    assert draw(logits, plain(params(temperature=1e-7)))[0].token_ids[0] == int(logits.argmax())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_temperature(temperature):
    """Guards against a temperature that multiplies, and a noise that is not Gumbel's."""
    logits = logits_of(2)
    assert_distributed(drawn_set(logits, temperature=temperature), softmax(logits[0] / temperature))


def test_draws_of_one_position_follow_the_distribution_over_seeds():
    """Guards against a generator that uses only the position, or only half of the seed."""
    logits = logits_of(3)
    for shift in (0, 32):
        draws = [plain(params(temperature=1.0, seed=seed << shift)) for seed in range(3000)]
        drawn = draw(np.repeat(logits, 3000, axis=0), *draws, positions=[11] * 3000)
        ids, counts = np.unique([each.token_ids[0] for each in drawn], return_counts=True)
        assert_distributed(dict(zip(ids.tolist(), counts.tolist(), strict=True)), softmax(logits[0]))


def test_draws_of_neighbouring_positions_are_independent():
    """Guards against a counter whose positions overlap: pairs of successive draws must cover the product."""
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, 6:] = -np.inf
    drawn = draw(np.repeat(logits, 6001, axis=0), *[plain(params(temperature=1.0, seed=9))] * 6001)
    ids = np.array([each.token_ids[0] for each in drawn])
    pairs, counts = np.unique(ids[:-1] * 6 + ids[1:], return_counts=True)
    assert_distributed(dict(zip(pairs.tolist(), counts.tolist(), strict=True)), np.full(36, 1 / 36))


@pytest.mark.parametrize("top_k", [1, 2, 5, 52, 53, 1000])
def test_top_k(top_k):
    logits = logits_of(4)
    kept = np.argsort(-logits[0])[:top_k]
    expected = np.zeros(VOCAB)
    expected[kept] = softmax(logits[0, kept])
    assert_distributed(drawn_set(logits, top_k=top_k), expected)


@pytest.mark.parametrize("top_p", [0.01, 0.4, 0.9, 0.999])
def test_top_p(top_p):
    """Guards against a nucleus that is one token too small or too large."""
    logits = logits_of(5)
    expected = np.zeros(VOCAB)
    probabilities, total = softmax(logits[0]), 0.0
    for token in np.argsort(-probabilities):
        expected[token] = probabilities[token]
        total += probabilities[token]
        if total >= top_p:
            break
    assert_distributed(drawn_set(logits, top_p=top_p), expected / expected.sum())


def test_top_p_counts_what_top_k_left():
    """Guards against the wrong order: top_k first, top_p of what it leaves."""
    logits = np.full((1, VOCAB), -1.0, np.float32)
    logits[0, :4] = np.log([4, 3, 2, 1])
    assert set(drawn_set(logits, top_k=4, top_p=0.65)) == {0, 1}  # 4/10 < 0.65 <= 7/10
    assert set(drawn_set(logits, top_p=0.65)) > {0, 1}


def test_min_p():
    """Guards against a floor that is taken before the temperature."""
    logits = logits_of(6)
    probabilities = softmax(logits[0] / 2.0)
    expected = np.where(probabilities >= 0.2 * probabilities.max(), probabilities, 0)
    assert_distributed(drawn_set(logits, temperature=2.0, min_p=0.2), expected / expected.sum())


def test_rows_with_and_without_filters_do_not_mix():
    """Guards against a filter of one row that is applied to the row beside it."""
    logits = logits_of(7, 4)
    kinds = [params(temperature=1.0), params(temperature=1.0, top_k=1), params(), params(temperature=1.0, top_p=0.01)]
    together = draw(logits, *map(plain, kinds), positions=[3, 4, 5, 6])
    for row, kind in enumerate(kinds):
        assert draw(logits[row : row + 1], plain(kind), positions=[3 + row])[0] == together[row]
    assert [together[row].token_ids[0] for row in (1, 2, 3)] == logits[1:].argmax(-1).tolist()


@pytest.mark.parametrize(
    "penalties",
    [
        {"repetition_penalty": 1.6},
        {"repetition_penalty": 0.7},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.8},
        {"presence_penalty": -1.0, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
    ],
)
def test_penalties(penalties):
    """Repetition counts prompt and output, presence and frequency the output only, as in vLLM."""
    logits = logits_of(8)
    prompt, output = [3, 5, 5, 8], [5, 9, 9, 9, 11]
    expected = logits[0].astype(np.float64)
    for token in set(prompt + output):
        penalty = penalties.get("repetition_penalty", 1.0)
        expected[token] = expected[token] / penalty if expected[token] > 0 else expected[token] * penalty
    for token in set(output):
        expected[token] -= penalties.get("frequency_penalty", 0.0) * output.count(token)
        expected[token] -= penalties.get("presence_penalty", 0.0)
    sampling = params(temperature=1.0, seed=4, **penalties)
    row = plain(sampling, history=prompt + output, prompt_len=len(prompt), num_generated=len(output))
    drawn = draw(np.repeat(logits, 3000, axis=0), *[row] * 3000)
    ids, counts = np.unique([each.token_ids[0] for each in drawn], return_counts=True)
    assert_distributed(dict(zip(ids.tolist(), counts.tolist(), strict=True)), softmax(expected))


def test_penalties_change_greedy_rows_too():
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, [4, 6]] = [2.0, 1.9]
    row = plain(params(frequency_penalty=0.2), history=[1, 4], prompt_len=1, num_generated=1)
    assert draw(logits, row)[0].token_ids[0] == 6


def test_logit_bias():
    """Guards against a bias that is ignored, or that an unknown token id turns into a crash."""
    logits = logits_of(9)
    assert draw(logits, plain(params(logit_bias=((17, 100.0), (10_000, 100.0)))))[0].token_ids[0] == 17
    best = int(logits.argmax())
    assert draw(logits, plain(params(logit_bias=((best, -100.0),))))[0].token_ids[0] == int(np.argsort(-logits[0])[1])


def test_only_allowed_tokens_are_drawn():
    """Guards against a bias or a penalty that brings back what is not allowed, and filters that look at it."""
    logits = logits_of(12)
    order = np.argsort(-logits[0])
    allowed = (int(order[9]), int(order[4]), 9999)
    biased = {"logit_bias": ((int(order[0]), 100.0),), "repetition_penalty": 0.1}
    for fields in ({}, biased):
        row = plain(params(allowed_token_ids=allowed, **fields), history=[int(order[0])], prompt_len=1)
        assert draw(logits, row)[0].token_ids[0] == order[4]
    probabilities = np.zeros(VOCAB)
    probabilities[list(allowed[:2])] = softmax(logits[0])[list(allowed[:2])]
    counts = drawn_set(logits, allowed_token_ids=allowed)
    assert_distributed(counts, probabilities / probabilities.sum())
    assert set(drawn_set(logits, allowed_token_ids=allowed, top_k=1)) == {int(order[4])}


def test_bad_words_end_where_they_began():
    """Guards against words that begin in the prompt, that are forbidden everywhere, and against shorter histories."""
    logits = logits_of(13)
    best, then = (int(token) for token in np.argsort(-logits[0])[:2])
    for word, prompt, output, expected in (
        ((best,), [], [], then),
        ((best,), [], [5], then),
        ((5, best), [], [], best),
        ((5, best), [5], [], best),  # the prompt's
        ((5, best), [], [5], then),
        ((5, best), [], [5, 6], best),
        ((5, 6, best), [5], [6], best),
        ((5, 6, best), [], [9, 5, 6], then),
        ((5, 10_000), [], [5], best),
    ):
        row = plain(
            params(bad_words=(word, (7, then))),
            history=(*prompt, *output),
            prompt_len=len(prompt),
            num_generated=len(output),
        )
        assert draw(logits, row)[0].token_ids[0] == expected, (word, prompt, output)


def test_min_tokens_suppresses_the_stop_tokens_until_then():
    logits = logits_of(10)
    order = np.argsort(-logits[0])
    sampling = params(min_tokens=3, stop_token_ids=(int(order[0]), int(order[1]), 9999))
    biased = params(min_tokens=3, stop_token_ids=sampling.stop_token_ids, logit_bias=((int(order[5]), -1.0),))
    for num_generated, expected in ((0, order[2]), (2, order[2]), (3, order[0])):
        for each in (sampling, biased):  # also where the row is edited for another reason
            assert draw(logits, plain(each, num_generated=num_generated))[0].token_ids[0] == expected


def test_logprobs_are_those_of_the_raw_logits():
    """Guards against log probabilities that penalties, bias or temperature have changed, and of another row."""
    logits = logits_of(11, 3)
    sampling = params(
        temperature=0.3, top_k=1, logprobs=True, top_logprobs=4, logit_bias=((50, 30.0),), presence_penalty=1.0
    )
    row = plain(sampling, history=[1, 2], prompt_len=1, num_generated=1)
    drawn = draw(logits, plain(params()), row, plain(params(logprobs=True)))
    assert not drawn[0].logprobs
    expected = np.log(softmax(logits[1]))
    assert drawn[1].token_ids[0] == 50 and drawn[1].logprobs
    assert drawn[1].logprobs[0].logprob == pytest.approx(expected[50], abs=1e-5)
    assert [token for token, _ in drawn[1].logprobs[0].top] == np.argsort(-expected)[:4].tolist()
    assert [value for _, value in drawn[1].logprobs[0].top] == pytest.approx(sorted(expected)[-1:-5:-1], abs=1e-5)
    assert drawn[2].logprobs and drawn[2].logprobs[0].top == ()
    assert drawn[2].logprobs[0].logprob == pytest.approx(np.log(softmax(logits[2])).max(), abs=1e-5)
