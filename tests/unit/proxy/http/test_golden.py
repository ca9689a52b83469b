"""The exact bytes of answers, streamed and not: what clients have parsed so far must not change by accident.

Ids and times are replaced. After a wanted change, `python -m baton.tests.unit.proxy.http.test_golden` writes the files
anew; read their difference.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from baton.node.errors import PeerLost
from baton.node.messages.control import Logprob
from baton.proxy.http.app import create_app
from baton.proxy.interface import AppSettings, Delta
from baton.proxy.text.model_text import ModelText
from baton.testing.fake_engine import EngineCall, FakeEngine, ScriptStep

GOLDEN = Path(__file__).parent / "golden"
CHAT: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION: dict[str, Any] = {"model": "demo", "prompt": "Hi"}
RESPONSE: dict[str, Any] = {"model": "demo", "input": "Hi"}
LOGPROBS: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
STREAM: dict[str, Any] = {"stream": True}
PATHS = {"completion": "/v1/completions", "chat": "/v1/chat/completions", "response": "/v1/responses"}
USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
ANSWER = 'A "quote", é.'

REQUESTS: dict[str, dict[str, Any]] = {
    "completion": COMPLETION,
    "completion_stream": COMPLETION | STREAM,
    "completion_usage": COMPLETION | USAGE,
    "completion_logprobs": COMPLETION | {"logprobs": 1},
    "completion_logprobs_stream": COMPLETION | {"logprobs": 1} | USAGE,
    "completion_n2": COMPLETION | {"n": 2, "prompt": ["Hi", "Hi there"]},
    "completion_n2_stream": COMPLETION | {"n": 2, "prompt": ["Hi", "Hi there"]} | USAGE,
    "completion_echo_stop": COMPLETION | {"echo": True, "stop": ["quo"]},
    "completion_echo_stop_stream": COMPLETION | {"echo": True, "stop": ["quo"]} | USAGE,
    "chat": CHAT,
    "chat_stream": CHAT | STREAM,
    "chat_usage": CHAT | USAGE,
    "chat_logprobs": CHAT | {"logprobs": True, "top_logprobs": 2},
    "chat_logprobs_stream": CHAT | {"logprobs": True, "top_logprobs": 2} | STREAM,
    "chat_n2": CHAT | {"n": 2},
    "chat_n2_stream": CHAT | {"n": 2, "logprobs": True} | USAGE,
    "chat_stop_stream": CHAT | {"stop": ["te", "."], "include_stop_str_in_output": True} | STREAM,
    "chat_failure_stream": CHAT | STREAM | {"seed": 1},
    "completion_ids": COMPLETION | {"return_token_ids": True, "prompt": ["Hi", "Hi there"], "stop": "quo"},
    "completion_ids_stream": COMPLETION | {"return_token_ids": True} | STREAM,
    "completion_ids_logprobs": COMPLETION | {"return_tokens_as_token_ids": True, "logprobs": 1},
    "chat_ids": CHAT | {"return_token_ids": True, "n": 2},
    "chat_ids_stream": CHAT | {"return_token_ids": True} | STREAM,
    "chat_ids_logprobs": CHAT | {"return_tokens_as_token_ids": True, "logprobs": True, "top_logprobs": 1},
    "completion_refused": COMPLETION | {"temprature": 1.0},
    "response": RESPONSE | LOGPROBS | {"instructions": "Be brief.", "metadata": {"a": "b"}},
    "response_stream": RESPONSE | LOGPROBS | STREAM,
    "response_failure_stream": RESPONSE | STREAM | {"seed": 1},
    "response_refused": RESPONSE | {"previous_response_id": "resp_1"},
}


def script(text: ModelText, call: EngineCall) -> list[ScriptStep]:
    """One delta a token, the second with two tokens, then the end token; a request with a seed fails on its way."""
    ids = text.encode(ANSWER, add_special_tokens=False)
    likely = tuple((token, -0.125 * place) for place, token in enumerate(ids))[: call.sampling.top_logprobs]
    steps: list[ScriptStep] = []
    for cut in (ids[:1], ids[1:3], *((token,) for token in ids[3:]), (text.eos_ids[-1],)):
        logprobs = tuple(Logprob(-0.5 * token, likely) for token in cut) if call.sampling.logprobs else ()
        steps.append(Delta(cut, logprobs, "stop" if cut[0] == text.eos_ids[-1] else "", 1))
    return [*steps[:2], PeerLost("gave up")] if call.sampling.seed == 1 else steps


async def answer(text: ModelText, name: str) -> str:
    """Status, headers that say what it is, and the body, with its events sorted by choice."""
    engine = FakeEngine(lambda call: script(text, call))
    app = create_app(engine, {"demo": text}, AppSettings())
    path = PATHS[name.partition("_")[0]]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as client:
        got = await client.post(path, json=REQUESTS[name])
    body = re.sub(r'"id":"([a-z]+)-[0-9a-f]{32}"', r'"id":"\1-ID"', got.text)
    body = re.sub(r'"(resp|msg)_[0-9a-f]{32}', r'"\1_ID', body)
    body = re.sub(r'"created(_at)?":\d+', r'"created\1":0', body)
    events = body.split("\n\n")
    shown = "\n\n".join(sorted(events[:-1], key=_choice_of) + events[-1:])
    return f"{got.status_code} {got.headers['content-type']}\n{shown}"


def _choice_of(event: str) -> int:
    """Choices run at once: the order of their events among each other is not part of the interface."""
    found = re.search(r'"choices":\[\{"index":(\d+)', event)
    return int(found[1]) if found else 1000


@pytest.mark.parametrize("name", REQUESTS)
async def test_an_answer_has_these_bytes(text: ModelText, name: str) -> None:
    """Guards clients against a field that is gone, renamed or in another chunk."""
    expected = (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")
    assert await answer(text, name) == expected


async def _write() -> None:
    text = ModelText(Path(__file__).parents[4] / "models" / "demo")
    for name in REQUESTS:
        (GOLDEN / f"{name}.txt").write_text(await answer(text, name), encoding="utf-8")
    text.close()


if __name__ == "__main__":
    asyncio.run(_write())
