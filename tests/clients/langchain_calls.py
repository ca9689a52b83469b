"""langchain-openai, unchanged: invoke, stream, batch, a chain, log probabilities, and the model of completions.

Run by test_clients.py in an environment of its own: argv[1] is the server, argv[2] what must come back.
"""

from __future__ import annotations

import asyncio
import json
import sys

import openai
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI

BASE_URL, WANTED = sys.argv[1], json.loads(sys.argv[2])
SERVER = {"base_url": BASE_URL, "api_key": "none", "model": "demo", "max_retries": 0, "timeout": 60}
GREEDY = {"temperature": 0, "max_tokens": WANTED["max_tokens"]}
(QUESTION,) = (message["content"] for message in WANTED["messages"])

chat = ChatOpenAI(**SERVER, **GREEDY)


def check_invoke() -> None:
    answer = chat.invoke(QUESTION)
    assert answer.content == WANTED["chat"]
    assert answer.response_metadata["finish_reason"] == "length"
    assert answer.usage_metadata["input_tokens"] == WANTED["chat_prompt_tokens"]
    assert answer.usage_metadata["output_tokens"] == WANTED["max_tokens"]


def check_stream() -> None:
    pieces = list(ChatOpenAI(**SERVER, **GREEDY, stream_usage=True).stream(QUESTION))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole += piece
    assert whole.content == WANTED["chat"]
    assert whole.usage_metadata["output_tokens"] == WANTED["max_tokens"]
    assert whole.response_metadata["finish_reason"] == "length"


async def check_async() -> None:
    assert "".join([piece.content async for piece in chat.astream(QUESTION)]) == WANTED["chat"]
    assert [answer.content for answer in await chat.abatch([QUESTION] * 3)] == [WANTED["chat"]] * 3


def check_chain() -> None:
    chain = ChatPromptTemplate.from_messages([("human", "{question}")]) | chat | StrOutputParser()
    assert chain.invoke({"question": QUESTION}) == WANTED["chat"]


def check_history() -> None:
    """Roles as LangChain writes them, and an answer sent back as it came."""
    messages = [SystemMessage("Tell stories."), HumanMessage(QUESTION), chat.invoke(QUESTION), HumanMessage("Go on.")]
    again = [*messages[:2], AIMessage(WANTED["chat"]), messages[3]]
    assert chat.invoke(messages).content == chat.invoke(again).content


def check_parameters() -> None:
    entries = chat.bind(logprobs=True, top_logprobs=2).invoke(QUESTION).response_metadata["logprobs"]["content"]
    assert len(entries) == WANTED["max_tokens"] and all(len(entry["top_logprobs"]) == 2 for entry in entries)
    stop = WANTED["chat"][20:26]
    assert chat.invoke(QUESTION, stop=[stop]).content == WANTED["chat"][: WANTED["chat"].index(stop)]
    drawn = ChatOpenAI(**SERVER, temperature=1.0, max_tokens=16, seed=3, n=2, extra_body={"top_k": 50})
    (choices,) = drawn.generate([[HumanMessage(QUESTION)]]).generations
    assert len({choice.text for choice in choices}) == 2


def check_completions() -> None:
    completion = OpenAI(**SERVER, **GREEDY)
    assert completion.invoke(WANTED["prompt"]) == WANTED["completion"]
    assert "".join(completion.stream(WANTED["prompt"])) == WANTED["completion"]


def check_errors() -> None:
    try:
        ChatOpenAI(**{**SERVER, "model": "gpt-4"}).invoke(QUESTION)
    except openai.NotFoundError as error:
        assert error.code == "model_not_found"
        return
    raise AssertionError("a model that is not served was answered")


if __name__ == "__main__":
    check_invoke()
    check_stream()
    asyncio.run(check_async())
    check_chain()
    check_history()
    check_parameters()
    check_completions()
    check_errors()
