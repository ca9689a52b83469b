"""Answers of a given form from real processes: every one that stops is valid, whatever worker drew which token.

Decode workers verify drafts, so that what is compared with an answer without (`PLAIN`) guards these too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import pytest
from tokenizers import Tokenizer

from baton.node.messages.control import Grammar, SamplingSpec
from baton.proxy.text.grammar import lark_of
from baton.proxy.text.grammar_request import GrammarRequest
from baton.tests.integration.cluster import Cluster
from baton.tests.unit.worker.demo_worker import END_IDS, FOLDER, DemoWorker

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
COMPACT = {"json": PERSON, "disable_any_whitespace": True}
"""Hot draws write much white space."""
END_OF_REASONING = 183
"""The token `</think>` of the demo model."""
COUNT = {"type": "object", "properties": {"least": {"type": "integer"}}, "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "add_person", "parameters": PERSON}},
    {"type": "function", "function": {"name": "count_people", "parameters": COUNT}},
]
CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Who is there?"}],
    "temperature": 2.0,
    "max_tokens": 200,
}
DRAFTS = ("--speculate", "ngram")
PLAIN = {"speculative": False}
RESPONSE_FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(decode=2, decode_args=DRAFTS) as made:
        yield made


def ask(cluster: Cluster, **fields: Any) -> dict[str, Any]:
    return cluster.complete("Once upon a time", **{"max_tokens": 200, "temperature": 2.0, **fields})


def text_of(answer: dict[str, Any]) -> str:
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop", choice
    return str(choice["text"])


def check_person(text: str) -> None:
    value = json.loads(text)
    assert set(value) == set(PERSON["required"])
    assert len(value["name"]) <= 12 and 0 <= value["age"] <= 150 and set(value["tags"]) <= {"red", "green", "blue"}


def test_random_answers_are_valid_and_repeat(cluster: Cluster) -> None:
    """Guards the seam between prefill, which draws the first token, and decode; free requests run beside them."""

    def one(seed: int, **more: Any) -> str:
        return text_of(ask(cluster, seed=seed, structured_outputs=COMPACT, **more))

    with ThreadPoolExecutor(8) as threads:
        free = [threads.submit(ask, cluster, seed=seed, max_tokens=40) for seed in range(6)]
        first = list(threads.map(one, range(12)))
        again = list(threads.map(lambda seed: one(seed, **PLAIN), range(12)))
        beside = [each.result()["choices"][0]["text"] for each in free]
    assert first == again and len(set(first)) > 6
    for text in first:
        check_person(text)
    assert beside == [ask(cluster, seed=seed, max_tokens=40, **PLAIN)["choices"][0]["text"] for seed in range(6)]
    accepted = "spec_decode_accepted_grammar_total"
    cluster.wait_until(lambda: sum(cluster.worker_values(accepted).values()) > 12, "forced tokens")


def test_a_hand_over_changes_no_answer(cluster: Cluster) -> None:
    """Guards the seam between workers: one that computes all by itself draws the same, from the first token on."""
    grammar = Grammar(text=lark_of(GrammarRequest("json", json.dumps(PERSON), "p", compact=True)), end_ids=END_IDS)
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    requests = {
        str(seed): SamplingSpec(max_tokens=200, temperature=2.0, seed=seed, grammar=grammar, stop_token_ids=END_IDS)
        for seed in range(4)
    }
    alone = DemoWorker(num_blocks=128).answers(requests, tokenizer.encode("Once upon a time").ids)
    for name, answer in alone.items():
        assert text_of(ask(cluster, seed=int(name), top_p=1.0, structured_outputs=COMPACT)) == tokenizer.decode(
            answer.ids
        )
    cluster.wait_until(
        lambda: sum(cluster.worker_values("transfers_received_total").values()) >= len(alone), "transfers"
    )


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"choice": ["cat", "dog"]}}, "cat|dog"),
        ({"structured_outputs": {"regex": "[a-f]{4}-[0-9]{2}"}}, "[a-f]{4}-[0-9]{2}"),
        ({"guided_grammar": 'root ::= "<" [a-z] [a-z] ">"'}, "<[a-z]{2}>"),
        ({"guided_regex": "ab?", "temperature": 0}, "ab?"),
        ({"guided_choice": ["x"], "min_tokens": 20}, "x"),
    ],
)
def test_other_forms(cluster: Cluster, fields: dict[str, Any], pattern: str) -> None:
    """Guards each surface through to the draw; min_tokens does not keep a complete answer from ending."""
    for seed in range(3):
        assert re.fullmatch(pattern, text_of(ask(cluster, seed=seed, **fields)))


def test_chats_and_streams_have_the_form_too(cluster: Cluster) -> None:
    """Guards against a surface that one endpoint ignores."""
    fields = {"model": cluster.nodes.model, "temperature": 0.0, "response_format": RESPONSE_FORMAT}
    body = {**fields, "messages": [{"role": "user", "content": "Who?"}]}
    reply = httpx.post(f"{cluster.url}/v1/chat/completions", json=body, timeout=120)
    check_person(reply.json()["choices"][0]["message"]["content"])
    streamed = cluster.begin("Once upon a time", max_tokens=200, seed=1, temperature=2.0, structured_outputs=COMPACT)
    assert streamed.join().text == text_of(ask(cluster, seed=1, structured_outputs=COMPACT))


def test_the_form_begins_behind_reasoning(cluster: Cluster) -> None:
    """Guards against workers and a proxy that do not agree on where reasoning ends, and an end before the form."""
    body: dict[str, Any] = {
        "model": cluster.nodes.model,
        "messages": [{"role": "user", "content": "Tell me a story."}],
        "chat_template_kwargs": {"enable_thinking": True},
        "response_format": RESPONSE_FORMAT,
    }

    def answer(**more: Any) -> dict[str, Any]:
        reply = httpx.post(f"{cluster.url}/v1/chat/completions", json={**body, **more}, timeout=120)
        choice: dict[str, Any] = reply.json()["choices"][0]
        return choice

    for seed in range(3):  # the model has not learnt to end its reasoning
        message = answer(seed=seed, temperature=1.0, logit_bias={str(END_OF_REASONING): 24})["message"]
        check_person(message["content"])
        assert message["reasoning_content"]
    choice = answer(temperature=0.0, thinking_token_budget=12)
    check_person(choice["message"]["content"])
    free = answer(temperature=0.0, thinking_token_budget=12, response_format=None, max_tokens=40)
    assert free["message"]["reasoning_content"] == choice["message"]["reasoning_content"]
    assert free["message"]["content"]
    choice = answer(temperature=0.0, max_tokens=300)  # it would end, if it might
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] is None and choice["message"]["reasoning_content"]


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "add_person"}}], ids=["required", "named"]
)
def test_forced_calls_are_valid_at_any_temperature(cluster: Cluster, choice: Any) -> None:
    """Guards the whole way of a forced call: template, grammar, draws of both roles, and the reading of the answer."""

    def one(seed: int, **more: Any) -> dict[str, Any]:
        body = {**CHAT, "model": cluster.nodes.model, "tools": TOOLS, "tool_choice": choice, "seed": seed, **more}
        found = httpx.post(f"{cluster.url}/v1/chat/completions", json=body, timeout=120).json()["choices"][0]
        return dict(found)

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(one, range(6)))
    ended = [each for each in answers if each["finish_reason"] != "length"]
    assert len(ended) > 1
    for each in ended:
        message = each["message"]
        assert message["content"] is None
        assert each["finish_reason"] == ("tool_calls" if choice == "required" else "stop")
        assert choice == "required" or len(message["tool_calls"]) == 1
        for call in message["tool_calls"]:
            name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
            jsonschema.validate(arguments, PERSON if name == "add_person" else COUNT)
    again, before = (
        [call["function"] for call in each["message"]["tool_calls"]] for each in (one(3, **PLAIN), answers[3])
    )
    assert again == before


def test_an_answer_that_is_cut_is_a_valid_beginning(cluster: Cluster) -> None:
    choice = ask(cluster, response_format=RESPONSE_FORMAT, max_tokens=5, seed=3)["choices"][0]
    assert choice["finish_reason"] == "length" and choice["text"].lstrip().startswith("{")


def test_what_cannot_be_enforced_is_an_error_of_the_client(cluster: Cluster) -> None:
    """Guards against status 200 with an answer of any form."""
    schema = {"type": "array", "items": {}, "uniqueItems": True}
    body = {"model": cluster.nodes.model, "prompt": "x", "structured_outputs": {"json": schema}}
    reply = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=120)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == "structured_outputs.json" and "uniqueItems" in error["message"]


def test_a_decode_worker_that_dies_changes_no_answer() -> None:
    """Guards the replay: another worker builds the grammar's state anew from the tokens that the client has."""
    digits = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 40, "maxItems": 40}
    fields = {
        "structured_outputs": {"json": digits, "disable_any_whitespace": True},
        "max_tokens": 200,
        "temperature": 2.0,
    }
    with Cluster(decode=2, decode_args=DRAFTS, decode_step_s=0.04) as cluster:
        alone = [cluster.begin("Once upon a time", **fields, **PLAIN, seed=seed) for seed in range(4)]
        expected = [stream.join().text for stream in alone]
        assert [stream.finish for stream in alone] == ["stop"] * 4
        streams = [cluster.begin("Once upon a time", **fields, seed=seed) for seed in range(4)]
        cluster.wait_until(lambda: all(stream.num_chunks > 3 for stream in streams), "four streams")
        running = cluster.worker_values("running")
        cluster.nodes.kill(max((name for name in running if name[0] == "d"), key=running.__getitem__))
        found = [stream.join() for stream in streams]
        assert [stream.error for stream in found] == [None] * 4
        assert [stream.text for stream in found] == expected
        assert all(len(json.loads(text)) == 40 for text in expected)
        assert cluster.counter("retries") > 0
