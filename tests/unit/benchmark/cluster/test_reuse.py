"""Guards `baton bench reuse`: the ideal cache beside the store, and equal prompts in every configuration."""

from __future__ import annotations

from tokenizers import Tokenizer

from baton.benchmark.cluster import reuse as bench
from baton.benchmark.cluster.reuse import BLOCK_TOKENS, Conversations
from baton.node.modelhub import DEMO_MODEL, locate_model

TOKENIZER = Tokenizer.from_file(str(locate_model(DEMO_MODEL) / "tokenizer.json"))


def conversations(*more: str) -> Conversations:
    return Conversations(bench._options(["--conversations", "2", *more]), TOKENIZER)


def text_of(num_tokens: int, word: str) -> str:
    text = word * num_tokens
    assert len(TOKENIZER.encode(text).ids) == num_tokens
    return text


def test_the_ideal_cache_finds_whole_blocks_of_what_came_before() -> None:
    """An ideal that is too low makes every store look good."""
    found = conversations()
    prompt = text_of(2 * BLOCK_TOKENS + 1, " day")
    found.log = [(prompt, prompt + " and"), (prompt, prompt + " and")]
    assert found.ideal(100) == 2 * BLOCK_TOKENS / (2 * (2 * BLOCK_TOKENS + 1))
    assert found.ideal(0) == 0.0


def test_the_ideal_cache_forgets_the_least_recent_blocks() -> None:
    """Without a bound it is an ideal that no store of this size could reach."""
    found = conversations()
    first, other = text_of(2 * BLOCK_TOKENS + 1, " day"), text_of(2 * BLOCK_TOKENS + 1, " man")
    found.log = [(first, first), (other, other), (first, first)]
    assert found.ideal(2) == 0.0 < found.ideal(4)


def test_every_configuration_gets_the_same_texts() -> None:
    """Other prompts would be another workload; a system prompt that is not shared leaves nothing to find."""
    texts = [conversations("--conversations", "9")._user_texts(0) for _ in range(2)]
    assert texts[0] == texts[1] != conversations("--conversations", "9", "--seed", "1")._user_texts(0)
    assert len({text.partition(".")[0] for text in texts[0]}) <= bench.NUM_SYSTEM_PROMPTS
