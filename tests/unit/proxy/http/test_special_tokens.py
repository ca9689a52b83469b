"""Special tokens in the text of an answer, where a client asks for them."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from baton.proxy.interface import Delta
from baton.proxy.text.model_text import ModelText
from baton.testing.fake_engine import EngineCall, FakeEngine, ScriptStep


@pytest.fixture
def engine(text: ModelText) -> FakeEngine:
    """Answers "Hi<|user|> you" and then the end token."""
    ids = text.encode("Hi<|user|> you", add_special_tokens=False) + (text.eos_ids[-1],)

    def script(call: EngineCall) -> list[ScriptStep]:
        return [*(Delta((token,)) for token in ids[:-1]), Delta((ids[-1],), finish="stop")]

    return FakeEngine(script)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, "Hi you"),
        ({"skip_special_tokens": True}, "Hi you"),
        ({"skip_special_tokens": False}, "Hi<|user|> you"),
        ({"skip_special_tokens": False, "stop": "<|user|>"}, "Hi"),
        ({"skip_special_tokens": False, "stop": "user|> y", "include_stop_str_in_output": True}, "Hi<|user|> y"),
    ],
)
async def test_special_tokens_are_shown_where_asked_for(
    client: httpx.AsyncClient, more: dict[str, Any], expected: str
) -> None:
    """Guards against tool calls that are lost because a model writes them between special tokens."""
    body = {"model": "demo", "prompt": "x", "max_tokens": 64, **more}
    answer = await client.post("/v1/completions", json=body)
    assert answer.json()["choices"][0]["text"] == expected
