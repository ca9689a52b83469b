"""The generator against the published answers, and the mapping of its words to tokens."""

import numpy as np
import pytest
import torch

from baton.kernels.philox import philox4x32, uniform, uniform_of

# philox4x32-10 lines of kat_vectors in Random123 1.14: counter, key, answer.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[np.ndarray, ...]:
    return tuple(np.array([int(word, 16)], dtype=np.uint64) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer):
    k0, k1 = words(key)
    assert philox4x32(words(counter), (k0, k1)) == words(answer)


def test_each_token_gets_the_word_that_the_definition_names():
    """Guards against lanes in another order than a GPU kernel will use: token t is word t % 4 of counter t // 4."""
    seed, position, vocab_size = (0x299F31D0 << 32) | 0xA4093822, 1234, 11
    u = uniform(torch.tensor([seed]), torch.tensor([position]), vocab_size)
    for token in range(vocab_size):
        counter = words(f"{token // 4:x} {position:x} 0 0")
        word = int(philox4x32(counter, (words("a4093822")[0], words("299f31d0")[0]))[token % 4][0])
        assert float(u[0, token]) == pytest.approx((word + 0.5) / 2**32, rel=1e-6)


def test_chosen_tokens_get_the_same_numbers():
    """Guards against a filtered draw that differs from the unfiltered one."""
    seeds, positions = torch.tensor([5, 5, 1 << 62]), torch.tensor([0, 1, 900])
    whole = uniform(seeds, positions, 1001)
    ids = torch.tensor([[0, 1, 2, 3, 4, 1000], [7, 6, 5, 999, 998, 3], [1000, 0, 500, 501, 502, 503]])
    assert torch.equal(uniform_of(seeds, positions, ids), whole.gather(1, ids))


def test_a_part_of_the_vocabulary_gets_the_same_numbers():
    """Guards against ranks that draw over their tokens with the noise of others."""
    seeds, positions = torch.tensor([5, 1 << 62]), torch.tensor([0, 900])
    whole = uniform(seeds, positions, 1001)
    for first, end in ((0, 7), (1, 4), (3, 500), (998, 1001)):
        assert torch.equal(uniform(seeds, positions, end - first, first), whole[:, first:end])


def test_numbers_lie_inside_the_interval_and_are_even():
    """Guards against 0 and 1, whose logarithms are infinite, and against a bias."""
    u = uniform(torch.arange(20), torch.arange(20), 20_000).double()
    assert float(u.min()) > 0 and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 4 * (1 / 12 / u.numel()) ** 0.5
    counts = torch.histc(u, bins=64, min=0, max=1)
    expected = u.numel() / 64
    assert float(((counts - expected) ** 2 / expected).sum()) < 63 + 5 * (2 * 63) ** 0.5
