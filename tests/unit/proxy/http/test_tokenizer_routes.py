"""How conversations are rendered on request, and the routes of the tokenizer."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from baton.proxy.text.model_text import ModelText
from baton.proxy.text.template import ChatTemplate, RenderOptions
from baton.testing.fake_engine import FakeEngine

ASK = [{"role": "user", "content": "Once"}]
OPEN = [*ASK, {"role": "assistant", "content": "upon a "}]


@pytest.mark.parametrize(
    ("more", "options"),
    [
        ({}, RenderOptions()),
        ({"add_generation_prompt": False}, RenderOptions(add_generation_prompt=False)),
        (
            {"add_generation_prompt": False, "continue_final_message": True},
            RenderOptions(add_generation_prompt=False, continue_final_message=True),
        ),
    ],
)
async def test_chat_tokenize_and_render_make_one_prompt(
    client: httpx.AsyncClient, engine: FakeEngine, text: ModelText, more: dict[str, Any], options: RenderOptions
) -> None:
    """Guards against routes that disagree, so that a count of tokens is not that of the request."""
    prompt = text.render(OPEN, options)
    ids = text.encode(prompt, add_special_tokens=False)
    body = {"messages": OPEN, **more}
    assert (await client.post("/v1/chat/completions", json={"model": "demo", **body})).status_code == 200
    assert engine.calls[-1].prompt_ids == ids
    assert (await client.post("/tokenize", json=body)).json()["tokens"] == list(ids)
    rendered = await client.post("/v1/chat/completions/render", json={"model": "demo", **body})
    assert rendered.json() == {"prompt": prompt, "token_ids": list(ids)}
    assert prompt.endswith("upon a") == options.continue_final_message


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"a-b": 1}}, "chat_template_kwargs.a-b"),
        ({"chat_template_kwargs": {"a": "x" * 70_000}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs"),
    ],
)
async def test_contradictions_and_taken_names_are_refused(
    client: httpx.AsyncClient, more: dict[str, Any], param: str
) -> None:
    """Guards against a request that replaces its own messages, and against one of two wishes that is lost."""
    for path in ("/v1/chat/completions", "/v1/chat/completions/render"):
        answer = await client.post(path, json={"model": "demo", "messages": ASK, **more})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_tokenize_takes_one_prompt_and_shows_its_pieces(client: httpx.AsyncClient) -> None:
    """Guards against two prompts of which one is lost, and against pieces that do not join to the text."""
    answer = (await client.post("/tokenize", json={"prompt": "Hi you", "return_token_strs": True})).json()
    assert "".join(answer["token_strs"]) == "Hi you" and len(answer["token_strs"]) == answer["count"]
    for body in ({}, {"prompt": "Hi", "messages": ASK}, {"prompt": "Hi", "return_token_strs": 5}):
        assert (await client.post("/tokenize", json=body)).status_code == 400


async def test_tokenizer_info_names_the_special_tokens(client: httpx.AsyncClient) -> None:
    """Guards against lm-evaluation-harness loading a tokenizer from a hub because this one says nothing."""
    info = (await client.get("/tokenizer_info")).json()
    assert info["eos_token"] == "<|end|>" and info["chat_template"] and "bos_token" in info


def test_variables_reach_the_template_and_its_own_names_stay() -> None:
    """Guards against a switch such as `enable_thinking` that is lost."""
    template = ChatTemplate("{{ enable_thinking }}{{ level.x }}{{ tools[0].name }}", {})
    options = RenderOptions(tools=[{"name": "f"}], variables={"enable_thinking": False, "level": {"x": 3}})
    assert template.render(ASK, options) == "False3f"


@pytest.mark.parametrize("source", ["{{ messages[-1].content }}<e>", "{{ messages[-1].content | trim }}<e>"])
def test_a_continued_message_is_cut_as_transformers_cuts_it(source: str) -> None:
    """Guards against an answer that begins after an end token, or after a blank that the template had removed."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    expected, _ = utils.render_jinja_template([OPEN], chat_template=source, continue_final_message=True)
    options = RenderOptions(add_generation_prompt=False, continue_final_message=True)
    assert [ChatTemplate(source, {}).render(OPEN, options)] == expected
