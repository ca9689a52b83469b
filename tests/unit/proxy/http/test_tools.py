"""Calls and reasoning in the answers of chats, whole and streamed, of a model whose template has both.

Guards against calls that reach the user as text, chunks that clients cannot join, wrong reasons of an end, and tools
that are dropped in silence.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from llguidance import LLMatcher, LLTokenizer

from baton.node.messages.control import Grammar, Logprob, SamplingSpec
from baton.proxy.formats.events import CallArguments, CallBegin, CallEnd, ReasoningText
from baton.proxy.formats.machine import FormatMachine
from baton.proxy.formats.markup import Thinking
from baton.proxy.http.app import create_app
from baton.proxy.http.assembler import Assembler
from baton.proxy.http.events import ChoiceEnd, Content, TokenUsage, join_events
from baton.proxy.http.schema import IdRule, StopRule
from baton.proxy.interface import AppSettings, Delta, Generation
from baton.proxy.text.model_text import ModelText
from baton.testing.fake_engine import EngineCall, FakeEngine, ScriptStep
from baton.worker.constraint import Constraint

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}{# <tool_call> #}"
    "{% for message in messages %}<|user|>{{ message.content }}<|end|>{% endfor %}<|assistant|>\n"
    "{% if thinks is defined %}{{ '<think>\n' if thinks else '<think>\n\n</think>\n\n' }}{% endif %}"
)
ODD = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
"""With a keyword that cannot be enforced."""
BAD = {"type": "object", "properties": {"a": {"type": "nonsense"}}}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
JSON_OBJECT = {"type": "json_object"}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
BODY: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "max_tokens": 400}


def function(name: str, parameters: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named(name) for name in names]}}


@pytest.fixture(scope="module", params=["tokens", "texts"])
def folder(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Its markers are tokens of the vocabulary, or several tokens each."""
    made = tmp_path_factory.mktemp("model") / "demo"
    shutil.copytree(demo_folder, made, ignore=shutil.ignore_patterns("*.safetensors"))
    (made / "chat_template.jinja").write_text(TEMPLATE)
    if request.param == "texts":
        content = json.loads((made / "tokenizer.json").read_text())
        content["added_tokens"] = [each for each in content["added_tokens"] if each["special"]]
        (made / "tokenizer.json").write_text(json.dumps(content))
    return made


@pytest.fixture(scope="module")
def text(folder: Path) -> Iterator[ModelText]:
    made = ModelText(folder)
    yield made
    made.close()


class Answers:
    """Sets what the engine answers; two tokens a delta."""

    def __init__(self, text: ModelText) -> None:
        self.text = ""
        self.finish = "stop"
        self.grammar: Grammar | None = None
        self.prompts: list[str] = []
        self.grammars: list[str] = []
        """Of the requests, empty where the answer is free."""
        self._model_text = text

    def script(self, call: EngineCall) -> list[ScriptStep]:
        self.grammar = call.sampling.grammar
        self.prompts.append(self._model_text.decode(call.prompt_ids, skip_special_tokens=False))
        grammar = call.sampling.grammar
        self.grammars.append(grammar.text if grammar is not None else "")
        ids = self._model_text.encode(self.text, add_special_tokens=False)
        if self.finish == "stop":
            ids += (self._model_text.eos_ids[-1],)
        scores = Logprob(-0.5, ()) if call.sampling.logprobs else None
        deltas = [
            Delta(part, (scores,) * len(part) if scores else ())
            for part in (ids[place : place + 2] for place in range(0, len(ids), 2))
        ]
        return [*deltas[:-1], msgspec.structs.replace(deltas[-1], finish=self.finish)]


@pytest.fixture
def answers(text: ModelText) -> Answers:
    return Answers(text)


@pytest.fixture
async def client(answers: Answers, text: ModelText) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(FakeEngine(answers.script), {"demo": text}, AppSettings())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as made:
        yield made


async def ask(client: httpx.AsyncClient, **more: Any) -> dict[str, Any]:
    """The answer's choice, after a check that its stream says the same."""
    whole = await client.post("/v1/chat/completions", json={**BODY, **more})
    assert whole.status_code == 200, whole.text
    (choice,) = whole.json()["choices"]
    streamed = await client.post("/v1/chat/completions", json={**BODY, **more, "stream": True})
    parts = [part.removeprefix("data: ") for part in streamed.text.split("\n\n") if part]
    joined = join([json.loads(part)["choices"][0] for part in parts if part != "[DONE]"])
    message = choice["message"]
    assert joined["finish_reason"] == choice["finish_reason"]
    assert joined["content"] == (message["content"] or "")
    assert joined["reasoning_content"] == message.get("reasoning_content", "")
    assert joined["calls"] == [call["function"] for call in message.get("tool_calls", [])]
    return choice


def join(choices: list[dict[str, Any]]) -> dict[str, Any]:
    """As clients do: an id and a name once, at most one call a chunk, the reason last."""
    found: dict[str, Any] = {"content": "", "reasoning_content": "", "calls": []}
    for choice in choices:
        delta = choice["delta"]
        assert delta or choice["finish_reason"]
        for name in ("content", "reasoning_content"):
            found[name] += delta.get(name) or ""
        calls = delta.get("tool_calls", [])
        assert len(calls) <= 1
        for call in calls:
            if "id" in call:
                assert call["type"] == "function" and call["index"] == len(found["calls"])
                found["calls"].append({"name": call["function"]["name"], "arguments": ""})
            assert call["index"] == len(found["calls"]) - 1 and ("name" in call["function"]) == ("id" in call)
            found["calls"][-1]["arguments"] += call["function"]["arguments"]
        found["finish_reason"] = choice["finish_reason"]
        assert choice["finish_reason"] is None or not calls
    return found


async def test_calls(client: httpx.AsyncClient, answers: Answers) -> None:
    answers.text = f"I look.\n{CALL}\n{CALL}"
    choice = await ask(client, tools=TOOLS)
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls" and message["content"] == "I look."
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    ] * 2
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert '"name": "get_weather"' in answers.prompts[0]


async def test_content_is_null_beside_calls_alone(client: httpx.AsyncClient, answers: Answers) -> None:
    answers.text = CALL
    assert (await ask(client, tools=TOOLS))["message"]["content"] is None


async def test_a_cut_call_ends_by_length(client: httpx.AsyncClient, answers: Answers) -> None:
    answers.text, answers.finish = CALL.partition("ty")[0], "length"
    choice = await ask(client, tools=TOOLS)
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"ci'


async def test_parallel_calls_can_be_switched_off(client: httpx.AsyncClient, answers: Answers) -> None:
    """The answer ends where a second call begins: guards against tokens that no client gets."""
    answers.text = f"{CALL}\n{CALL} and so on"
    choice = await ask(client, tools=TOOLS, parallel_tool_calls=False)
    assert len(choice["message"]["tool_calls"]) == 1 and choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None


@pytest.mark.parametrize("more", [{}, {"tools": TOOLS, "tool_choice": "none"}])
async def test_without_tools_markers_are_text(
    client: httpx.AsyncClient, answers: Answers, more: dict[str, Any]
) -> None:
    answers.text = CALL
    choice = await ask(client, **more)
    assert choice["message"]["content"] == CALL and choice["finish_reason"] == "stop"
    assert "get_weather" not in answers.prompts[0]


async def test_broken_calls_are_counted(client: httpx.AsyncClient, answers: Answers) -> None:
    """Guards against calls that fail in silence: their answers are a 200."""
    name = 'baton:tool_calls_broken_total{format="hermes",model_name="demo"}'

    async def count() -> float:
        lines = (await client.get("/metrics")).text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(name))

    assert await count() == 0
    answers.text = CALL.replace("}}", "") + CALL
    await ask(client, tools=TOOLS)  # whole and streamed
    assert await count() == 2


OTHER = function("other", {"type": "object"})


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ("required", "tool_calls"),
        (named("get_weather"), "stop"),
        (allowed("required", "get_weather"), "tool_calls"),
        (allowed("auto", "get_weather"), "tool_calls"),
    ],
)
async def test_chosen_calls(client: httpx.AsyncClient, answers: Answers, choice: Any, reason: str) -> None:
    """Guards the reasons of ends, which clients branch on, and the prefix of prompts: all tools are shown."""
    answers.text = CALL
    answer = await ask(client, tools=[*TOOLS, OTHER], tool_choice=choice)
    assert answer["finish_reason"] == reason and answer["message"]["content"] is None
    assert [call["function"]["name"] for call in answer["message"]["tool_calls"]] == ["get_weather"]
    assert "other" in answers.prompts[0] and "get_weather" in answers.grammars[0]
    assert ("other" in answers.grammars[0]) == (choice == "required")
    answers.text, answers.finish = CALL.partition("ty")[0], "length"
    assert (await ask(client, tools=TOOLS, tool_choice="required"))["finish_reason"] == "length"


async def test_a_forced_answer_without_calls_just_stops(client: httpx.AsyncClient, answers: Answers) -> None:
    """Guards clients that read the first of an empty list of calls."""
    answers.text = ""
    answer = await ask(client, tools=TOOLS, tool_choice="required")
    assert answer["finish_reason"] == "stop" and "tool_calls" not in answer["message"]


async def test_arguments_of_a_call_without_any_are_an_empty_object(client: httpx.AsyncClient, answers: Answers) -> None:
    answers.text = '<tool_call>\n{"name": "get_weather"}\n</tool_call>'
    answer = await ask(client, tools=TOOLS)
    assert answer["message"]["tool_calls"][0]["function"]["arguments"] == "{}"


@pytest.mark.parametrize(
    ("more", "has_grammar"),
    [
        ({"tools": TOOLS}, False),
        ({"tools": [*TOOLS, function("f", BAD, strict=False)]}, False),
        ({"tools": [*TOOLS, function("f", BAD), function("g", {"type": "object"}, strict=True)]}, True),
        ({"tools": [*TOOLS, function("f", BAD)], "tool_choice": "required"}, True),
        ({"tools": [function("f", BAD, strict=False)], "tool_choice": named("f")}, True),
        ({"tools": TOOLS, "tool_choice": "none"}, False),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, True),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}, "tool_choice": "required"}, True),
    ],
)
async def test_what_is_forced(
    client: httpx.AsyncClient, answers: Answers, more: dict[str, Any], has_grammar: bool
) -> None:
    """Guards free answers against masks, and agents against a 400 for one odd schema that nothing is bound to."""
    answers.text = CALL
    await ask(client, **more)
    assert [bool(each) for each in answers.grammars] == [has_grammar] * 2


async def test_an_answer_of_a_form_may_call_instead(client: httpx.AsyncClient, answers: Answers) -> None:
    form = {"type": "json_object"}
    answers.text = CALL
    assert (await ask(client, tools=TOOLS, response_format=form))["finish_reason"] == "tool_calls"
    answers.text = '{"a": 1}'
    answer = await ask(client, tools=TOOLS, response_format=form)
    assert (answer["message"]["content"], answer["finish_reason"]) == ('{"a": 1}', "stop")


async def test_an_undeclared_function_stays_content(client: httpx.AsyncClient, answers: Answers) -> None:
    answers.text = CALL.replace("get_weather", "other")
    choice = await ask(client, tools=TOOLS)
    assert choice["message"]["content"] == answers.text and choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("written", "variables", "reasoning", "content"),
    [
        ("<think>\na b\n</think>\n\nc", {}, "a b", "c"),
        ("a b\n</think>\n\nc", {"thinks": True}, "a b", "c"),
        ("c", {"thinks": False}, None, "c"),
        ("c", {}, None, "c"),
        ("a b", {"thinks": True}, "a b", None),
    ],
)
async def test_reasoning(
    client: httpx.AsyncClient,
    answers: Answers,
    written: str,
    variables: dict[str, bool],
    reasoning: str | None,
    content: str | None,
) -> None:
    answers.text = written
    message = (await ask(client, chat_template_kwargs=variables))["message"]
    assert (message.get("reasoning_content"), message["content"]) == (reasoning, content)


async def test_usage_has_the_tokens_of_reasoning(client: httpx.AsyncClient, answers: Answers, text: ModelText) -> None:
    answers.text = "a b</think>c"
    for more in ({"chat_template_kwargs": {"thinks": True}}, {"chat_template_kwargs": {"thinks": False}}):
        usage = (await client.post("/v1/chat/completions", json={**BODY, **more})).json()["usage"]
        found = usage.get("completion_tokens_details", {}).get("reasoning_tokens", 0)
        marked = len(text.encode("a b</think>", add_special_tokens=False))
        assert found == (marked if more["chat_template_kwargs"]["thinks"] else 0)


async def test_events_are_in_the_order_of_the_text(text: ModelText) -> None:
    """Guards APIs whose answers are lists of items against an order that depends on which tokens come together."""
    ids = text.encode(f"<think>\na\n</think>\n\nb E\n{CALL}", add_special_tokens=False)
    sampling = SamplingSpec(max_tokens=400)
    for num_together in (1, 2, 3, len(ids)):
        machine = FormatMachine(text.markup.with_calls, Thinking.UNKNOWN, {"get_weather": {}}, str)
        generation = Generation(request_id="r", model="demo", prompt_ids=(1,), sampling=sampling)
        stop = StopRule(("END", " END"), include=False)
        assembler = Assembler(generation, "", text, stop, IdRule(show=False, logprobs_by_id=False), machine=machine)
        cuts = [ids[place : place + num_together] for place in range(0, len(ids), num_together)]
        deltas = [Delta(cut) for cut in cuts[:-1]] + [Delta(cuts[-1], finish="stop")]
        events = [event for delta in deltas for event in assembler.feed(delta)]
        kinds = [kind for kind, _ in itertools.groupby(type(event) for event in events)]
        assert kinds == [ReasoningText, Content, CallBegin, CallArguments, CallEnd, ChoiceEnd, TokenUsage]
        assert join_events(0, events).text == "b E"


async def test_log_probabilities_are_those_of_content(
    client: httpx.AsyncClient, answers: Answers, text: ModelText
) -> None:
    """Guards against the loss of the first one, before which reasoning could have begun."""
    answers.text, answers.finish = "a b c", "length"
    body = {**BODY, "logprobs": True, "tools": TOOLS}

    async def shown() -> list[str]:
        choice = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
        return [entry["token"] for entry in choice["logprobs"]["content"]]

    tokens = await shown()
    assert "".join(tokens) == "a b c"
    if text.markup.with_calls.marker_of:  # else the pieces of markers are not known as such
        answers.text = f"<think>d</think>a b c{CALL}"
        assert await shown() == tokens


async def test_stop_strings_count_in_content_only(client: httpx.AsyncClient, answers: Answers) -> None:
    answers.text = "<think>\na END\n</think>\n\nb END c"
    choice = await ask(client, stop="END")
    assert choice["message"]["reasoning_content"] == "a END"
    assert choice["message"]["content"] == "b " and choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("written", "variables"),
    [
        ("so\n</think>\n\n", {"thinks": True}),
        ("</think>", {"thinks": True}),
        ("<think>so</think>\n", {}),
        ("", {}),
        ("", {"thinks": False}),
    ],
)
async def test_the_form_of_an_answer_begins_behind_its_reasoning(
    client: httpx.AsyncClient,
    answers: Answers,
    text: ModelText,
    folder: Path,
    written: str,
    variables: dict[str, bool],
) -> None:
    """Guards against a grammar that swallows reasoning, and one that does not begin where the content does."""
    answers.text = written + '{"a": 1}'
    message = (await ask(client, chat_template_kwargs=variables, response_format=JSON_OBJECT, tools=TOOLS))["message"]
    assert message["content"] == '{"a": 1}'
    assert message.get("reasoning_content", "") == ("so" if "so" in written else "")
    tokenizer = LLTokenizer((folder / "tokenizer.json").read_text(), text.vocab_size, list(text.eos_ids))
    constraint = Constraint(answers.grammar, LLMatcher(tokenizer, answers.grammar.text))
    constraint.advance([*text.encode(answers.text, add_special_tokens=False), text.eos_ids[0]])
    assert not constraint.is_broken


async def test_a_call_in_reasoning_does_not_end_it_before_a_form(client: httpx.AsyncClient, answers: Answers) -> None:
    """Guards against content that is in no form: the grammar begins behind the end marker."""
    answers.text, answers.finish = f"so {CALL}", "length"
    asked = {"chat_template_kwargs": {"thinks": True}, "tools": TOOLS}
    choice = await ask(client, **asked, response_format=JSON_OBJECT)
    assert choice["finish_reason"] == "length" and choice["message"]["content"] is None
    assert "tool_calls" not in choice["message"] and choice["message"]["reasoning_content"].startswith("so ")
    assert "tool_calls" in (await ask(client, **asked))["message"]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": named("get_weather")}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": named("other")}, "tool_choice.function.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "get_weather"}}, "tool_choice.function.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom", "custom": {"name": "x"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": allowed("any", "get_weather")}, "tool_choice.allowed_tools.mode"),
        ({"tools": TOOLS, "tool_choice": allowed("auto")}, "tool_choice.allowed_tools.tools"),
        (
            {"tools": TOOLS, "tool_choice": allowed("auto", "other")},
            "tool_choice.allowed_tools.tools.0.function.name",
        ),
        ({"tools": TOOLS, "tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
        ({"tools": [function("f", {"type": "string"})]}, "tools.0.function.parameters"),
        ({"tools": [*TOOLS, function("f", ODD, strict=True)]}, "tools.1.function.parameters"),
        ({"tools": [function("f", BAD)], "tool_choice": named("f")}, "tools.0.function.parameters"),
        ({"tools": [*TOOLS, *TOOLS]}, "tools.1.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"parameters": {}}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "f", "description": "x" * (1 << 18)}}]}, "tools"),
    ],
)
async def test_bad_tools_are_refused(client: httpx.AsyncClient, more: dict[str, Any], param: str) -> None:
    answer = await client.post("/v1/chat/completions", json={**BODY, **more})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("tool_format", "written", "content"),
    [("none", CALL, None), ("pythonic", '[get_weather(city="Rome")]', None), ("pythonic", CALL, CALL)],
)
async def test_an_option_overrules_the_template(
    folder: Path, tool_format: str, written: str, content: str | None
) -> None:
    """Guards a model by whose template the wrong format is found."""
    text = ModelText(folder, tool_format=tool_format)
    answers = Answers(text)
    answers.text = written
    app = create_app(FakeEngine(answers.script), {"demo": text}, AppSettings())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as client:
        answer = (await client.post("/v1/chat/completions", json={**BODY, "tools": TOOLS})).json()
    text.close()
    if tool_format == "none":
        assert answer["error"]["param"] == "tools" and "--tool-format" in answer["error"]["message"]
    else:
        message = answer["choices"][0]["message"]
        assert message["content"] == content and bool(message.get("tool_calls")) == (content is None)


@pytest.mark.parametrize("shown", ["", "{# tools #}{# <tool_call> #}"])
async def test_tools_of_a_model_without_tools_are_refused(demo_folder: Path, tmp_path: Path, shown: str) -> None:
    """Guards against tools that the prompt loses in silence: the template has none, or ignores them."""
    folder = tmp_path / "demo"
    shutil.copytree(demo_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "chat_template.jinja").write_text(
        shown + "{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    text = ModelText(folder)
    app = create_app(FakeEngine(lambda call: []), {"demo": text}, AppSettings())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as client:
        answer = await client.post("/v1/chat/completions", json={**BODY, "tools": TOOLS})
    text.close()
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")


async def test_calls_that_no_grammar_can_force_are_read_and_not_forced(demo_folder: Path) -> None:
    """Guards against a choice that is dropped in silence."""
    text = ModelText(demo_folder, tool_format="glm45")
    answers = Answers(text)
    answers.text = "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call>"
    app = create_app(FakeEngine(answers.script), {"demo": text}, AppSettings())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as client:
        strict = [function("get_weather", {"type": "object"}, strict=True)]  # as clients say unasked
        for tools in (TOOLS, strict):
            called = (await ask(client, tools=tools))["message"]["tool_calls"][0]["function"]
            assert called == {"name": "get_weather", "arguments": '{"city": "Rome"}'}
        for fields, param in (
            ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
            ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "tools"),
        ):
            answer = await client.post("/v1/chat/completions", json={**BODY, **fields})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, param) and "glm45" in error["message"]
    text.close()


async def test_channels_are_read_also_without_tools(demo_folder: Path, tmp_path: Path) -> None:
    """Guards gpt-oss's answers from headers in their text, and every answer from being made a call by `strict`."""
    folder = tmp_path / "demo"
    shutil.copytree(demo_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    turns = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text("{{ tools }}" + turns + "{# <|channel|>final<|message|> #}")
    text = ModelText(folder)
    answers = Answers(text)
    head = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>"
    app = create_app(FakeEngine(answers.script), {"demo": text}, AppSettings())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as client:
        answers.text = head + "final<|message|>Hello"
        choice = await ask(client)
        assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("Hm.", "Hello")
        answers.text = head + 'commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Rome"}'
        for strict in (None, True):
            choice = await ask(client, tools=[function("get_weather", {"type": "object"}, strict=strict)])
            called = choice["message"]["tool_calls"][0]["function"]
            assert called == {"name": "get_weather", "arguments": '{"city": "Rome"}'}
            assert choice["finish_reason"] == "tool_calls" and not answers.grammars[-1]
        await ask(client, tools=TOOLS, tool_choice="required")
        assert "functions." in answers.grammars[-1]
    text.close()
