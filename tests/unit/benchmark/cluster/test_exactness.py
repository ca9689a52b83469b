"""Guards `baton bench exactness`: what counts as equal; both sides differ only in the worker that prefills."""

from __future__ import annotations

from baton.benchmark.cluster import exactness as bench
from baton.benchmark.cluster.completions import Completion, random_ids
from baton.benchmark.cluster.running import ServedModel

MODEL = ServedModel("m", ("--load-format=dummy",), 64, 1 << 23)


def answer(tokens: str, logprob: float = -1.0, prompt_tokens: int = 1) -> Completion:
    return Completion(tokens, tuple(tokens), tuple(logprob for _ in tokens), prompt_tokens)


def test_tokens_count_up_to_the_first_difference() -> None:
    """Behind it the answers have different beginnings, and what is equal there is chance."""
    found = bench.compare([answer("abcd"), answer("abcd")], [answer("abcd", -2.0), answer("abxd")])
    assert (found["equal"], found["total"], found["equal_tokens_share"]) == (1, 2, 6 / 8)
    assert (found["first_difference"], found["equal_logprobs"], found["distinct_tokens"]) == (2, 1, 4)


def test_lengths_of_prompts_say_where_bits_begin_to_differ() -> None:
    """Guards against another night of guesses: a table that was wrong from a position on looked like chance."""
    ours = [answer("ab", -1.0, length) for length in (1, 300, 440, 2000)]
    theirs = [ours[0], ours[1], answer("ab", -1.1, 440), answer("xb", -1.0, 2000)]
    found = bench.compare(ours, theirs)
    assert (found["longest_equal"], found["shortest_differing"]) == (2000, 440)
    theirs[3] = answer("xb", -1.1, 2000)
    found = bench.compare(ours, theirs)
    assert (found["longest_equal"], found["shortest_differing"], found["differing_at_first"]) == (300, 440, 1)


def test_exact_is_bit_for_bit_on_a_gpu() -> None:
    """A CPU's log probabilities differ in their last bits with the batch; a GPU that is deterministic has no excuse."""
    same, close, other = ([answer("ab", -1.0)], [answer("ab", -1.1)], [answer("ac", -1.0)])
    found = [bench.compare(same, theirs) for theirs in (same, close, other)]
    assert [bench.is_exact(each, "cuda") for each in found] == [True, False, False]
    assert [bench.is_exact(each, "cpu") for each in found] == [True, True, False]


def test_an_answer_that_is_cut_off_is_not_equal() -> None:
    """A lost token is the worst difference of all."""
    found = bench.compare([answer("ab")], [answer("abcd")])
    assert (found["equal"], found["equal_tokens_share"], found["first_difference"]) == (0, 0.5, 2)


def test_all_lengths_fit_and_the_ends_are_there() -> None:
    """The shortest prompt, of one token, and the longest are where code paths differ."""
    found = bench.lengths(64, 2000, seed=0)
    assert (len(found), min(found), max(found)) == (64, 1, 2000)
    assert bench.lengths(1, 2000, seed=0) == [1]


def test_the_pool_holds_everything() -> None:
    """A preempted sequence is computed again in other steps, so its tokens would test something else."""
    assert bench.blocks_for([1, 64], 64, 64) == 64 + 2 + 2


def test_both_sides_get_the_same_options() -> None:
    """Another context or pool would change the captured steps."""
    options = bench._options(["--gpus", "0", "--longest", "100"])
    ours, theirs = (bench.settings_of(w, MODEL, 99, True, options) for w in (bench.DISAGGREGATED, bench.COLOCATED))
    assert ours.worker_arg == theirs.worker_arg
    assert "--deterministic" in ours.worker_arg and "--max-model-len=164" in ours.worker_arg
    assert "--deterministic" not in bench.settings_of((1, 1), MODEL, 99, False, options).worker_arg


def test_a_longer_prompt_begins_with_a_shorter_one() -> None:
    """Prefixes are what the tier benchmarks share between prompts."""
    assert random_ids(20, 1, "a")[:10] == random_ids(10, 1, "a") != random_ids(10, 2, "a")
