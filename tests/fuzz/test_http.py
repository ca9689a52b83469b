"""What clients and servers send over HTTP: a body is a request or a 400, an answer is one or an error."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any, cast

import pytest

from baton.benchmark.load.meter import EventStream, StreamMeter, message_of
from baton.node.errors import BadRequest
from baton.node.http_client import HttpFailed, _Connection
from baton.node.modelhub import locate_model
from baton.offline.outputs import failure_message, request_output
from baton.proxy.http.anthropic.request import read_count, read_messages
from baton.proxy.http.responses.request import read_responses
from baton.proxy.http.schema import read_chat, read_completion
from baton.proxy.text.model_text import ModelText
from baton.tests.fuzz.mutations import SEED, feed, mutations

COMPLETIONS = [
    {"model": "m", "prompt": "Hello", "max_tokens": 4, "stop": ["a", "b"], "logit_bias": {"5": -1.5}, "seed": 3},
    {
        "model": "m",
        "prompt": [[1, 2], [3]],
        "n": 2,
        "best_of": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    {
        "model": "m",
        "prompt": "x",
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "echo": True,
        "logprobs": 3,
    },
    {
        "model": "m",
        "prompt": [1],
        "bad_words": ["x"],
        "stop_token_ids": [7],
        "priority": -4,
        "cache_salt": "s",
        "top_a": 1,
    },
]
CHATS = [
    {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 4, "tools": []},
    {
        "model": "m",
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {
                "role": "assistant",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "5"},
        ],
        "logprobs": True,
        "top_logprobs": 2,
        "chat_template_kwargs": {"enable_thinking": False},
    },
]


MESSAGES_BODIES = [
    {
        "model": "m",
        "max_tokens": 4,
        "system": [{"type": "text", "text": "x-anthropic-billing-header: a"}, {"type": "text", "text": "b"}],
        "messages": [
            {"role": "user", "content": "Hi"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "a", "signature": "b"},
                    {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "1",
                        "content": [{"type": "text", "text": "5"}],
                        "is_error": True,
                    },
                    {"type": "text", "text": "So?", "cache_control": {"type": "ephemeral"}},
                ],
            },
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}, {"type": "bash_20250124", "name": "bash"}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    },
    {
        "model": "m",
        "max_tokens": 2000,
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So"}],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "output_config": {"effort": None, "format": {"type": "json_schema", "schema": {"type": "object"}}},
        "stop_sequences": ["a"],
        "temperature": 0.5,
        "metadata": {"user_id": "u"},
        "betas": ["x"],
    },
]
FUNCTION = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": False}
RESPONSES_BODIES = [
    {
        "model": "m",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "a"}], "content": None},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "5"}]},
            {"type": "custom_tool_call", "call_id": "2", "name": "c", "namespace": "n", "input": "x"},
        ],
        "tools": [
            FUNCTION,
            {"type": "namespace", "name": "n", "tools": [{"type": "custom", "name": "c", "format": {"type": "text"}}]},
            {"type": "web_search"},
        ],
        "tool_choice": "auto",
    },
    {
        "model": "m",
        "input": "Hi",
        "tools": [FUNCTION],
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
    },
    {
        "model": "m",
        "input": "Hi",
        "instructions": "a",
        "max_output_tokens": 4,
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}, "verbosity": "medium"},
        "reasoning": {"summary": "auto"},
        "include": ["message.output_text.logprobs"],
        "metadata": {"a": "b"},
        "stream": True,
        "stream_options": {"include_obfuscation": False},
    },
]


@pytest.mark.parametrize(
    ("read", "bodies"),
    [
        (read_completion, COMPLETIONS),
        (read_chat, CHATS),
        (read_responses, RESPONSES_BODIES),
        (read_messages, MESSAGES_BODIES),
        (read_count, MESSAGES_BODIES),
    ],
)
def test_bodies(read: Any, bodies: list[dict[str, Any]]) -> None:
    """Guards the proxy against a body that ends in a 500, and the client against an error without an end."""

    def accept(data: bytes) -> None:
        try:
            read(data)
        except BadRequest as error:
            assert error.status == 400 and len(str(error)) < 2000
            raise

    feed([json.dumps(body).encode() for body in bodies], 6000, accept, BadRequest)


STREAM = (
    b'data: {"id":"c","choices":[{"index":0,"text":"He","finish_reason":null}]}\n\n'
    b": a comment\n\n"
    b'data: {"id":"c","choices":[{"index":0,"delta":{"role":"assistant","content":"\\u00e9"}}]}\r\n\r\n'
    b'data: {"error":{"message":"x","type":"server_error"}}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\ndata: [DONE]\n\n'
)


def test_streams_of_events() -> None:
    """Guards the meter of a load against a server that sends anything; and a stream that is cut anywhere."""
    chance = random.Random(SEED)
    errors = 0
    for data in mutations([STREAM], 3000):
        meter = StreamMeter(keep_text=True)
        cut = chance.randrange(len(data) + 1)
        meter.feed(data[:cut], 1.0)
        meter.feed(data[cut:], 2.0)
        meter.end(3.0)
        errors += bool(meter.error)
        message_of(data)
        whole, pieces = EventStream(), EventStream()
        assert whole.feed(data) + whole.flush() == pieces.feed(data[:cut]) + pieces.feed(data[cut:]) + pieces.flush()
    assert errors


class _Transport:
    """Takes what the client writes."""

    def write(self, data: bytes) -> None:
        pass

    def abort(self) -> None:
        pass


RESPONSES = [
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b'HTTP/1.1 400 Bad Request\r\nContent-Length: 13\r\nConnection: close\r\n\r\n{"error":"x"}',
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\nuntil the end",
]


async def test_responses() -> None:
    """Guards clients against servers that answer anything, in any pieces: an answer, or HttpFailed."""
    chance = random.Random(SEED)
    ended = 0
    for number, data in enumerate(mutations(RESPONSES, 3000)):
        connection = _Connection(lambda: 0.0)
        connection.connection_made(cast(asyncio.BaseTransport, _Transport()))
        body: list[bytes] = []
        exchange = asyncio.ensure_future(connection.exchange(b"", lambda part, _, body=body: body.append(part) is None))
        await asyncio.sleep(0)
        cut = chance.randrange(len(data) + 1)
        for part in (data[:cut], data[cut:]):
            connection.data_received(part)
        connection.connection_lost(None)
        try:
            status = await exchange
        except HttpFailed:
            continue
        ended += 1
        assert 0 < status < 100_000 and sum(map(len, body)) <= len(data), f"input {number}: {data!r}"
    assert ended


ANSWER = {
    "choices": [
        {
            "index": 0,
            "text": "a",
            "finish_reason": "stop",
            "token_ids": [5],
            "prompt_token_ids": [1, 2],
            "logprobs": {"tokens": ["token_id:5"], "token_logprobs": [-1.0], "top_logprobs": [{"token_id:5": -1.0}]},
            "prompt_logprobs": [None, {"2": {"logprob": -1.0, "rank": 1, "decoded_token": "b"}}],
        }
    ],
    "usage": {"prompt_tokens": 2, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 0}},
}


def test_answers() -> None:
    """Guards the offline client against a server of another make."""
    body = json.dumps(ANSWER).encode()

    def accept(data: bytes) -> None:
        assert len(failure_message(500, data)) < 3000
        request_output("r", None, data, 1)

    feed([body, b'{"error":{"message":"no such model","code":null}}'], 4000, accept, ValueError)


def test_detokenizing_any_ids() -> None:
    """Guards streams against ids that no text ever has: pieces joined are the text of all, and memory is bounded."""
    text = ModelText(locate_model("demo"))
    chance = random.Random(SEED)
    for _ in range(500):
        prompt = [chance.randrange(text.vocab_size) for _ in range(chance.randrange(4))]
        ids = [chance.randrange(chance.choice((260, text.vocab_size))) for _ in range(chance.randrange(60))]
        detokenizer = text.detokenizer(prompt, skip_special_tokens=chance.random() < 0.5)
        pieces = []
        for token_id in ids:
            pieces.append(detokenizer.push(token_id))
            assert len(detokenizer._window) <= 64
        pieces.append(detokenizer.flush())
        joined = "".join(pieces)
        joined.encode()
        assert len(joined) <= 64 * (len(ids) + 1)
    text.close()
