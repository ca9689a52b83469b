"""The rules for streams of /v1/responses that clients check, as a small state machine, and answers to check it with.

The accumulators of openai-python and openai-node raise on an event without its item or part, an index that comes twice
and an id that changes; Codex takes items from `output_item.done` and drops text whose part was not added.
"""

from __future__ import annotations

import json
from typing import Any

TEXT_DELTAS = {"message": "response.output_text", "reasoning": "response.reasoning_text"}
CALL_DELTAS = {
    "function_call": ("response.function_call_arguments", "arguments"),
    "custom_tool_call": ("response.custom_tool_call_input", "input"),
}
ENDS = {"response.completed", "response.incomplete", "response.failed"}


def events_of(stream: str) -> list[dict[str, Any]]:
    """Frames in, events out; each frame has a name, which its data repeats."""
    assert stream.endswith("\n\n") and "[DONE]" not in stream
    events = []
    for frame in stream.removesuffix("\n\n").split("\n\n"):
        name, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def final_response(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The response that the last event has, after a check of all events."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    created, in_progress, *items, last = events
    assert (created["type"], in_progress["type"]) == ("response.created", "response.in_progress")
    begun = created["response"]
    assert begun == in_progress["response"]
    assert (begun["status"], begun["output"], begun["usage"], begun["error"]) == ("in_progress", [], None, None)
    ends = [place + 1 for place, event in enumerate(items) if event["type"] == "response.output_item.done"]
    done = [_item(items[start:end], index) for index, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]
    response = last["response"]
    assert last["type"] in ENDS and last["type"] == f"response.{response['status']}"
    assert (response["id"], response["created_at"]) == (begun["id"], begun["created_at"])
    if last["type"] == "response.failed":
        assert response["error"]["code"] and response["error"]["message"]
        assert response["output"][: len(done)] == done and len(response["output"]) <= len(done) + 1
    else:
        assert response["output"] == done and len(items) == (ends[-1] if ends else 0)
        assert response["error"] is None and response["usage"]["total_tokens"] > 0
        assert (response["incomplete_details"] is None) == (response["status"] == "completed")
    ids = [item["id"] for item in response["output"]]
    assert len(set(ids)) == len(ids)
    return response


def _item(events: list[dict[str, Any]], index: int) -> dict[str, Any]:
    added, *inside, ended = events
    assert added["type"] == "response.output_item.added"
    first, item = added["item"], ended["item"]
    assert {event["output_index"] for event in events} == {index}
    assert {event["item_id"] for event in inside} == {first["id"]} == {item["id"]}
    assert first["status"] == "in_progress" and item["status"] in ("completed", "incomplete")
    assert first["type"] == item["type"]
    if item["type"] in TEXT_DELTAS:
        _check_text(first, inside, item)
    else:
        _check_call(first, inside, item)
    return item


def _check_text(first: dict[str, Any], inside: list[dict[str, Any]], item: dict[str, Any]) -> None:
    kind = TEXT_DELTAS[item["type"]]
    assert first["content"] == []
    part, *deltas, text_done, part_done = inside
    assert part["type"] == "response.content_part.added" and part["part"]["text"] == ""
    assert {event["content_index"] for event in inside} == {0}
    assert all(event["type"] == f"{kind}.delta" for event in deltas)
    text = "".join(event["delta"] for event in deltas)
    assert text_done["type"] == f"{kind}.done" and text_done["text"] == text
    assert part_done["type"] == "response.content_part.done" and part_done["part"]["text"] == text
    assert item["content"] == [part_done["part"]]
    if item["type"] == "message":
        assert item["role"] == first["role"] == "assistant" and part_done["part"]["annotations"] == []
        shown = [entry for event in deltas for entry in event["logprobs"]]
        assert text_done["logprobs"] == part_done["part"]["logprobs"] == shown


def _check_call(first: dict[str, Any], inside: list[dict[str, Any]], item: dict[str, Any]) -> None:
    kind, field = CALL_DELTAS[item["type"]]
    assert first[field] == "" and all(first[name] == item[name] for name in ("call_id", "name"))
    *deltas, done = inside
    assert deltas and all(event["type"] == f"{kind}.delta" for event in deltas)
    text = "".join(event["delta"] for event in deltas)
    assert done["type"] == f"{kind}.done" and done[field] == text == item[field]
    assert item["type"] == "custom_tool_call" or done["name"] == item["name"]
