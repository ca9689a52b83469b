"""Messages of any output of a model, however its tokens arrive: the blocks are those of the text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.node.messages.control import SamplingSpec
from baton.proxy.formats.events import call_id
from baton.proxy.formats.machine import FormatMachine
from baton.proxy.formats.markup import Thinking
from baton.proxy.http.anthropic.encoder import MessagesEncoder
from baton.proxy.http.assembler import Assembler
from baton.proxy.http.encoder import AnswerHeader
from baton.proxy.http.events import Event, TokenUsage
from baton.proxy.http.schema import IdRule, StopRule
from baton.proxy.interface import Delta, Generation
from baton.proxy.text.model_text import ModelText
from baton.tests.unit.proxy.http.anthropic.stream_reader import read_stream

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'
PIECES = (
    *("<think>", "</think>", "\n", "\n\n", "Yes.", " no", "日本", "sto", "stop", "{", "<tool_call>", "</tool_call>"),
    *(CALL, CALL[:-18], CALL.replace('"f"', '"g"'), "\n" + CALL),
)
HEADER = AnswerHeader(
    id="msg_1",
    created=5,
    model="demo",
    logprobs=False,
    token_ids=False,
    include_usage=False,
    prompt_tokens=1,
    sampling=SamplingSpec(max_tokens=9),
)


def events_of(text: ModelText, ids: Sequence[int], cuts: Sequence[int], finish: str) -> list[list[Event]]:
    """Those of each delta; the ids are cut at `cuts`."""
    generation = Generation(
        request_id="r",
        model="demo",
        prompt_ids=(5,),
        sampling=SamplingSpec(max_tokens=999, stop_token_ids=text.eos_ids),
    )
    machine = FormatMachine(
        text.markup.with_calls, Thinking.UNKNOWN, {"f": {}}, lambda index: call_id("r", 0, index), max_calls=None
    )
    assembler = Assembler(generation, "", text, StopRule(("stop",), False), IdRule(False, False), machine=machine)
    found: list[list[Event]] = []
    places = sorted({0, *(cut % (len(ids) + 1) for cut in cuts), len(ids)})
    for start, end in itertools.pairwise(places):
        found.append(assembler.feed(Delta(tuple(ids[start:end]), finish=finish if end == len(ids) else "")))
        if assembler.finish:
            break
    return found


def usage_of(deltas: Sequence[Sequence[Event]]) -> TokenUsage:
    last = deltas[-1][-1]
    assert isinstance(last, TokenUsage)
    return last


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=6),
    cuts=st.lists(st.integers(1, 200), max_size=40),
    finish=st.sampled_from(("stop", "length")),
)
def test_streams_and_whole_answers_are_one(
    markup_text: ModelText, pieces: list[str], cuts: list[int], finish: str
) -> None:
    """Guards against blocks that depend on how many tokens a delta has, or on whether the answer is streamed."""
    ids = (*markup_text.encode("".join(pieces), add_special_tokens=False), markup_text.eos_ids[-1])
    deltas, together = (events_of(markup_text, ids, each, finish) for each in (cuts, ()))
    encoder = MessagesEncoder(HEADER)
    frames = [encoder.opening(0, 0), *(encoder.frames(0, events) for events in deltas), encoder.end(usage_of(deltas))]
    whole: dict[str, Any] = json.loads(
        MessagesEncoder(HEADER).whole([[event for events in together for event in events]], usage_of(together))
    )
    assert read_stream(b"".join(frames).decode()) == whole
    shown = [block for block in whole["content"] if block["type"] == "text"]
    assert all("stop" not in block["text"] and "<think>\n" not in block["text"][:8] for block in shown)
