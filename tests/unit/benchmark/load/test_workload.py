"""What is asked: lengths, shared prefixes, blocks of traces, files, cancels; and the tokens that stand for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from baton.benchmark.load.plan import GivenPrompt, Part, PartsPrompt, Turn
from baton.benchmark.load.prompts import FIRST_ID, WORDS, RandomParts, words_of
from baton.benchmark.load.traces import MOONCAKE_BLOCK_TOKENS, TraceRequest
from baton.benchmark.load.workload import (
    Lengths,
    file_turns,
    random_turns,
    trace_turn,
    warmup_turns,
    with_cancels,
)
from baton.node.errors import SettingsError

DEMO = Path(__file__).resolve().parents[4] / "models" / "demo"
KEYS = st.tuples(st.integers(0, 3), st.integers(0, 1000))


def parts_of(turn: Turn) -> tuple[Part, ...]:
    assert isinstance(turn.prompt, PartsPrompt)
    return turn.prompt.parts


def ids_of(source: RandomParts, turn: Turn) -> list[int]:
    return [token_id for part in parts_of(turn) for token_id in source.ids(part)]


@given(st.integers(1, 500), st.integers(1, 500), st.floats(0, 1), st.integers(0, 99))
def test_lengths_stay_in_their_range(input_tokens: int, output_tokens: int, spread: float, seed: int) -> None:
    """A prompt of no token is refused by every server; one too long by most."""
    lengths = Lengths(input_tokens, output_tokens, spread, 0, 1)
    for turns in random_turns(lengths, 10, 2, seed):
        for turn in turns:
            low, high = round(input_tokens * (1 - spread)), round(input_tokens * (1 + spread))
            assert turn.prompt_tokens is not None and max(1, low) <= turn.prompt_tokens <= max(1, high)
            assert 1 <= turn.max_tokens <= max(1, round(output_tokens * (1 + spread)))
    assert random_turns(lengths, 3, 1, seed) == random_turns(lengths, 3, 1, seed)


def test_prefixes_are_shared_and_the_rest_is_not() -> None:
    """A prefix cache that hits by accident, or cannot hit at all, makes the figure worthless."""
    source = RandomParts(7, 2000)
    conversations = random_turns(Lengths(20, 5, 0.0, 30, 2), 40, 1, 0)
    prompts = [ids_of(source, turns[0]) for turns in conversations]
    assert {len(ids) for ids in prompts} == {50}
    assert len({tuple(ids[:30]) for ids in prompts}) == 2
    assert len({tuple(ids[30:]) for ids in prompts}) == 40
    warm = [ids_of(source, turn) for turn in warmup_turns(Lengths(20, 5, 0.0, 30, 2), 3)]
    assert {len(ids) for ids in warm} == {50} and not {tuple(ids[:4]) for ids in warm} & {
        tuple(ids[:4]) for ids in prompts
    }


@given(KEYS, st.integers(0, 60), st.integers(0, 60), st.integers(301, 200_000))
def test_equal_keys_are_equal_tokens(key: tuple[int, ...], shorter: int, more: int, vocab_size: int) -> None:
    """The cut end of a trace's block must begin as the whole block does."""
    source = RandomParts(3, vocab_size)
    short, long = source.ids(Part(key, shorter)), source.ids(Part(key, shorter + more))
    assert len(short) == shorter and long[:shorter] == short
    assert all(FIRST_ID <= token_id < vocab_size for token_id in long)
    assert source.text(Part(key, shorter + more)).startswith(source.text(Part(key, shorter)))


def test_another_salt_is_another_prompt() -> None:
    """The second run of the same command would otherwise find all its prompts in the server's cache."""
    part = Part((0, 1), 32)
    assert RandomParts(1, 2000).ids(part) == RandomParts(1, 2000).ids(part) != RandomParts(2, 2000).ids(part)


def test_text_has_as_many_tokens_as_it_says() -> None:
    """A prompt that is longer than it says makes prefill look slow."""
    words = words_of("demo")
    assert set(words) <= set(WORDS)
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    source = RandomParts(5, 2000, words)
    for length in (1, 7, 300):
        text = source.text(Part((0, 0), 50)) + source.text(Part((0, length), length))
        assert len(tokenizer.encode(text, add_special_tokens=False).ids) == 50 + length


def test_a_tokenizer_that_is_not_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SettingsError, match=r"tokenizer\.json"):
        words_of(str(tmp_path))
    with pytest.raises(SettingsError, match="vocab"):
        RandomParts(0, FIRST_ID)


def test_blocks_of_a_trace_are_shared_as_the_trace_says() -> None:
    """Blocks that begin elsewhere in another prompt would never be found again."""
    source = RandomParts(1, 2000)
    one = trace_turn(0, TraceRequest(0.0, 1200, 10, (5, 6, 7)), 1.0)
    two = trace_turn(1, TraceRequest(0.0, 1100, 10, (5, 6, 8)), 1.0)
    first, second = ids_of(source, one), ids_of(source, two)
    assert (len(first), len(second)) == (1200, 1100)
    assert first[: 2 * MOONCAKE_BLOCK_TOKENS] == second[: 2 * MOONCAKE_BLOCK_TOKENS]
    assert first[1024:1028] != second[1024:1028]


@given(st.integers(1, 40_000), st.floats(0.0001, 1))
def test_a_shrunk_trace_keeps_its_proportions(input_tokens: int, scale: float) -> None:
    """Lengths rounded to 0 would be refused; blocks cut at drifting places would share nothing."""
    blocks = tuple(range(-(-input_tokens // MOONCAKE_BLOCK_TOKENS)))
    turn = trace_turn(0, TraceRequest(0.0, input_tokens, 100, blocks), scale)
    assert turn.prompt_tokens == max(1, round(input_tokens * scale))
    assert all(part.num_tokens > 0 for part in parts_of(turn))
    full = trace_turn(0, TraceRequest(0.0, len(blocks) * MOONCAKE_BLOCK_TOKENS, 100, blocks), scale)
    for mine, other in zip(parts_of(turn)[:-1], parts_of(full), strict=False):
        assert mine == other


def test_a_trace_without_blocks_shares_nothing() -> None:
    one, two = (trace_turn(number, TraceRequest(0.0, 50, 1, ()), 1.0) for number in range(2))
    assert parts_of(one)[0].key != parts_of(two)[0].key


def test_a_prompt_file() -> None:
    """Text, ids and messages, with their own max_tokens or the default; gone through again where it is too short."""
    lines = [
        '{"prompt": "a b", "max_tokens": 3}',
        '{"prompt": [5, 6]}',
        '{"messages": [{"role": "user", "content": "x"}]}',
    ]
    turns = [turn for (turn,) in file_turns(lines, 4, 9)]
    assert [turn.max_tokens for turn in turns] == [3, 9, 9, 3]
    assert turns[1].prompt == GivenPrompt((5, 6)) and turns[1].prompt_tokens == 2
    assert turns[0].prompt_tokens is None and turns[2].prompt == GivenPrompt(({"role": "user", "content": "x"},))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{}", "one of prompt and messages"),
        ('{"prompt": "a", "messages": []}', "one of prompt and messages"),
        ('{"prompt": ""}', "empty"),
        ('{"prompt": 5}', "line 2"),
        ("nonsense", "line 2"),
    ],
)
def test_a_wrong_line_of_a_prompt_file_is_told(line: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        file_turns(['{"prompt": "a"}', line], 4, 9)
    with pytest.raises(SettingsError, match="empty"):
        file_turns(["", "  "], 1, 1)


@given(st.integers(1, 60), st.floats(0, 1), st.integers(0, 99))
def test_cancels_are_as_many_as_asked_for(count: int, rate: float, seed: int) -> None:
    """Near the end of an answer a cancel comes too late where chunks hold several tokens."""
    turns = with_cancels(random_turns(Lengths(4, 10, 0.5, 0, 1), count, 2, seed), rate, seed)
    assert sum(conversation[-1].cancel_after is not None for conversation in turns) == round(rate * count)
    assert all(conversation[0].cancel_after is None for conversation in turns)
    assert all(1 <= turn.cancel_after <= max(1, turn.max_tokens // 2) for c in turns for turn in c if turn.cancel_after)
