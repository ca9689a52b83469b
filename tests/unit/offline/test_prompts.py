"""The forms of prompts and conversations, and the errors for what has none of them."""

from __future__ import annotations

from typing import Any

import pytest

from baton.offline.prompts import OfflinePrompt, one_each, read_conversations, read_prompts

IDS = OfflinePrompt(None, (1, 2))


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("a", [OfflinePrompt("a")]),
        (["a", "b"], [OfflinePrompt("a"), OfflinePrompt("b")]),
        ({"prompt": "a"}, [OfflinePrompt("a")]),
        ({"prompt_token_ids": [1, 2]}, [IDS]),
        ({"prompt": "text", "prompt_token_ids": [1, 2]}, [OfflinePrompt("text", (1, 2))]),
        ([{"prompt_token_ids": [1, 2]}, "a"], [IDS, OfflinePrompt("a")]),
        ({"prompt": "a", "cache_salt": "s"}, [OfflinePrompt("a", cache_salt="s")]),
        ({"prompt_token_ids": [1, 2], "cache_salt": "s"}, [OfflinePrompt(None, (1, 2), "s")]),
        ([], []),
    ],
)
def test_forms_of_prompts(given: Any, read: list[OfflinePrompt]) -> None:
    assert read_prompts(given) == read


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (5, TypeError, "prompts must be"),
        (["a", None], TypeError, r"prompts\[1\]"),
        ([{}], TypeError, "needs 'prompt'"),
        ([{"prompt_token_ids": "12"}], TypeError, "list of int"),
        ([{"prompt": "a", "cache_salt": 5}], TypeError, "cache_salt"),
        ([{"prompt": "a", "multi_modal_data": {}}], ValueError, "multi_modal_data"),
    ],
)
def test_what_is_no_prompt_is_named(given: Any, error: type[Exception], said: str) -> None:
    """A picture that is silently left out gives a wrong answer."""
    with pytest.raises(error, match=said):
        read_prompts(given)


def test_one_conversation_or_several() -> None:
    """A conversation taken for several would be one answer a message."""
    hello, bye = {"role": "user", "content": "hello"}, {"role": "user", "content": "bye"}
    assert read_conversations([hello, bye]) == [[hello, bye]]
    assert read_conversations([[hello], [bye]]) == [[hello], [bye]]
    for wrong in ("hello", ["hello"], [[hello], "bye"], [[hello], ["bye"]]):
        with pytest.raises(TypeError, match="messages"):
            read_conversations(wrong)


def test_parameters_for_all_or_one_each() -> None:
    """Fewer parameters than prompts would leave prompts out."""
    assert one_each(None, 2) == [None, None]
    assert one_each(7, 2) == [7, 7]
    assert one_each([7, 8], 2) == [7, 8]
    with pytest.raises(ValueError, match="2 prompts, but 1 sampling_params"):
        one_each([7], 2)
