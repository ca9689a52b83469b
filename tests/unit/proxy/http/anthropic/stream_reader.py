"""Reads a stream of the Messages API as strict clients do, and checks the order of its events."""

from __future__ import annotations

import json
from typing import Any

ADDS = {
    "text": {"text_delta": "text"},
    "thinking": {"thinking_delta": "thinking", "signature_delta": "signature"},
    "tool_use": {"input_json_delta": "partial_json"},
}
"""Type of a block -> the deltas that it takes, and their fields."""


def events_of(stream: str) -> list[dict[str, Any]]:
    """The data of each event, which has its name as type."""
    assert stream.endswith("\n\n")
    found = []
    for frame in stream[:-2].split("\n\n"):
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def read_stream(stream: str) -> dict[str, Any]:
    """The message that the events build, which must be complete; the input of a broken call is {}."""
    first, *events = events_of(stream)
    assert first["type"] == "message_start"
    message: dict[str, Any] = first["message"]
    assert message["type"] == "message" and message["role"] == "assistant" and message["content"] == []
    assert message["stop_reason"] is None and message["usage"]["output_tokens"] == 0
    blocks: list[dict[str, Any]] = message["content"]
    is_open, is_ending = False, False
    for place, event in enumerate(events):
        kind = event["type"]
        if kind == "ping":
            continue
        if kind == "content_block_start":
            assert not is_open and not is_ending and event["index"] == len(blocks)
            blocks.append(_started(event["content_block"]))
            is_open = True
        elif kind == "content_block_delta":
            assert is_open and event["index"] == len(blocks) - 1
            _add(blocks[-1], event["delta"])
        elif kind == "content_block_stop":
            assert is_open and event["index"] == len(blocks) - 1
            is_open = False
        elif kind == "message_delta":
            assert not is_open and not is_ending
            is_ending = True
            message |= event["delta"]
            message["usage"] |= event["usage"]
        else:
            assert kind == "message_stop" and is_ending and place == len(events) - 1
            for block in blocks:
                if block["type"] == "tool_use":
                    block["input"] = _input(block.pop("partial_json"))
            return message
    raise AssertionError("the stream has no end")


def _started(block: dict[str, Any]) -> dict[str, Any]:
    """A block begins empty."""
    empty = {"text": {"text": ""}, "thinking": {"thinking": "", "signature": ""}, "tool_use": {"input": {}}}
    assert block.items() >= empty[block["type"]].items()
    return block | ({"partial_json": ""} if block["type"] == "tool_use" else {})


def _add(block: dict[str, Any], delta: dict[str, Any]) -> None:
    name = ADDS[block["type"]][delta["type"]]
    assert delta[name] and set(delta) == {"type", name}
    block[name] += delta[name]


def _input(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {}
