"""One request from its bytes to its outcome, by a server with known gaps and a clock that only the test moves."""

from __future__ import annotations

import asyncio
import json
from contextlib import closing

import pytest

from baton.benchmark.load.bodies import BodyStyle, BodyWriter, PastTurn
from baton.benchmark.load.client import OpenAIClient, StreamOutcome, find_model
from baton.benchmark.load.plan import GivenPrompt, Part, PartsPrompt, Turn
from baton.benchmark.load.prompts import RandomParts
from baton.node.errors import SettingsError
from baton.node.http_client import HttpClient, Origin
from baton.tests.unit.benchmark.load.scripted import (
    STREAM_END,
    STREAM_HEAD,
    ManualClock,
    Script,
    framed,
    read_request,
    server,
)
from baton.tests.unit.benchmark.load.test_meter import DONE, USAGE, chunk

TURN = Turn(GivenPrompt("hello"), 5)


def style(chat: bool = False, as_ids: bool = True, **extra: object) -> BodyStyle:
    return BodyStyle("m", chat, as_ids, temperature=0.0, ignore_eos=True, include_usage=True, extra=extra)


async def ask(
    origin: Origin, clock: ManualClock, cancel_after: int | None = None, timeout_s: float = 30.0
) -> StreamOutcome:
    http = HttpClient(origin, {}, clock.now_s)
    writer = BodyWriter(style(), RandomParts(0, 2000))
    with closing(OpenAIClient(http, writer, style(), timeout_s)) as client:
        return await client.send(client.prepare(TURN, ()), cancel_after, True, clock.now_s)


def answering(answer: bytes) -> Script:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(answer)
        writer.close()

    return script


async def test_a_server_with_known_gaps_is_measured_exactly() -> None:
    """The whole way, socket, parser and meter: times are those of the reads, not of what is done after them."""
    clock = ManualClock()
    script = [
        (0.5, chunk("a")),
        (0.25, chunk("b")),
        (0.125, chunk("c d")),
        (2.0, chunk("", "length")),
        (4.0, USAGE + DONE),
    ]

    async def gaps(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(STREAM_HEAD)
        await clock.read_again()
        for gap_s, data in script:
            clock.now += gap_s
            writer.write(framed(data))
            await clock.read_again()
        writer.write(STREAM_END)

    async with server(gaps) as origin:
        outcome = await ask(origin, clock)
    assert outcome.error == "" and not outcome.cancelled and outcome.text == "abc d"
    assert (outcome.first_s, outcome.last_s, outcome.gaps_s) == (100.5, 102.875, (0.25, 0.125, 2.0))
    assert outcome.usage is not None and outcome.usage.completion_tokens == 5


async def test_a_client_that_goes_away_says_so() -> None:
    """A cancelled request is no failure of the server, and no completed one."""
    many = STREAM_HEAD + b"".join(framed(chunk("x")) for _ in range(10))
    async with server(answering(many)) as origin:
        outcome = await ask(origin, ManualClock(), cancel_after=3)
    assert outcome.cancelled and outcome.error == "" and outcome.text.startswith("xxx")


async def test_an_answer_that_ends_before_the_cancel_is_complete() -> None:
    short = STREAM_HEAD + framed(chunk("x")) + framed(DONE) + STREAM_END
    async with server(answering(short)) as origin:
        outcome = await ask(origin, ManualClock(), cancel_after=3)
    assert not outcome.cancelled and outcome.error == "" and outcome.usage is None and outcome.num_text_chunks == 1


BUSY = b'{"error": {"message": "try later", "type": "x"}}'


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 429 Many\r\nContent-Length: %d\r\n\r\n%s" % (len(BUSY), BUSY), "HTTP 429: try later"),
        (b"HTTP/1.1 500 No\r\nContent-Length: 4\r\n\r\noops", "HTTP 500: oops"),
        (STREAM_HEAD + framed(chunk("x")), "connection lost in the middle of an answer"),
        (STREAM_HEAD + framed(DONE) + STREAM_END, "without a token"),
        (STREAM_HEAD + framed(b"data: {}}\n\n") + framed(DONE) + STREAM_END, "not an OpenAI stream"),
        (
            STREAM_HEAD + framed(chunk("x")) + framed(b"data: " + BUSY + b"\n\n") + STREAM_END,
            "in the stream: try later",
        ),
    ],
)
async def test_every_failure_has_its_reason(answer: bytes, said: str) -> None:
    """Failures without a reason are left out of reports."""
    async with server(answering(answer)) as origin:
        outcome = await ask(origin, ManualClock())
    assert said in outcome.error and not outcome.cancelled


async def test_a_silent_server_is_a_timeout() -> None:
    """A request that is never answered would keep the run from ending."""
    never = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await never.wait()

    async with server(silent) as origin:
        outcome = await ask(origin, ManualClock(), timeout_s=0.01)
        never.set()
    assert "timeout" in outcome.error and outcome.first_s is None


def models(*names: str) -> bytes:
    body = json.dumps({"object": "list", "data": [{"id": name} for name in names]}).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


@pytest.mark.parametrize(
    ("answer", "wanted", "found"),
    [
        (models("a", "b"), "", "a"),
        (models("a", "b"), "b", "b"),
        (b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", "c", "c"),
    ],
)
async def test_the_model_is_found(answer: bytes, wanted: str, found: str) -> None:
    async with server(answering(answer)) as origin:
        with closing(HttpClient(origin, {}, ManualClock().now_s)) as http:
            assert await find_model(http, wanted, 30.0) == found


@pytest.mark.parametrize(
    ("answer", "wanted", "said"),
    [
        (models("a", "b"), "c", "has no model 'c': it has a, b"),
        (models(), "", "--model"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "", "--model"),
        (b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n", "", "API key"),
        (b"", "", "no server"),
    ],
)
async def test_no_run_begins_without_its_model(answer: bytes, wanted: str, said: str) -> None:
    """A thousand failed requests say less than one line before them."""
    async with server(answering(answer)) as origin:
        http = HttpClient(origin, {}, ManualClock().now_s)
        with closing(http), pytest.raises(SettingsError, match=said):
            await find_model(http, wanted, 30.0)


def body(turn: Turn, *before: PastTurn, chat: bool = False, as_ids: bool = True, **extra: object) -> dict[str, object]:
    return dict(json.loads(BodyWriter(style(chat, as_ids, **extra), RandomParts(0, 2000)).body(turn, before)))


def test_bodies() -> None:
    """What OpenAI's API and vLLM's parameters are called, and nothing else: strict servers refuse the rest."""
    parts = PartsPrompt((Part((0, 0), 3), Part((0, 1), 2)))
    sent = body(Turn(parts, 7))
    assert isinstance(sent["prompt"], list) and len(sent["prompt"]) == 5
    assert {**sent, "prompt": 0} == {
        "model": "m",
        "prompt": 0,
        "max_tokens": 7,
        "stream": True,
        "temperature": 0.0,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    text = body(Turn(parts, 7), as_ids=False)["prompt"]
    assert isinstance(text, str) and len(text.split()) == 5
    assert body(TURN, temperature=0.5)["temperature"] == 0.5


def test_a_conversation_says_again_what_was_said() -> None:
    """Without the answers in it, the next turn's prefix is not what the server has cached."""
    said = (PastTurn("one", " two"), PastTurn(" three", " four"))
    assert body(TURN, *said)["prompt"] == "one two three fourhello"
    roles = body(TURN, *said, chat=True)["messages"]
    assert isinstance(roles, list)
    assert [(message["role"], message["content"]) for message in roles] == [
        ("user", "one"),
        ("assistant", " two"),
        ("user", " three"),
        ("assistant", " four"),
        ("user", "hello"),
    ]


@pytest.mark.parametrize(
    ("turn", "chat", "in_conversation"),
    [
        (Turn(GivenPrompt((1, 2)), 1), True, False),
        (Turn(GivenPrompt(({"role": "user", "content": "x"},)), 1), False, False),
        (Turn(GivenPrompt((1, 2)), 1), False, True),
    ],
)
def test_a_prompt_that_does_not_fit_the_endpoint_is_told_before_the_run(
    turn: Turn, chat: bool, in_conversation: bool
) -> None:
    writer = BodyWriter(style(chat), RandomParts(0, 2000))
    with pytest.raises(SettingsError, match="cannot be sent"):
        writer.check(turn, in_conversation)
    writer.check(TURN, in_conversation)
