"""Outputs of models that parsers elsewhere got wrong, and what they mean, each read whole, by character, and by cuts.

The failures behind them: completed brackets, lost calls, braces and quotes inside strings, text that only looks like a
call, tags that models leave out, arguments that are text, and parts of a markup that reach the user.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest

from baton.proxy.formats.events import CallBegin
from baton.proxy.formats.markup import THINK, Thinking
from baton.tests.unit.proxy.formats.renderers import Read, cut, machine_of, run, text_tokens

OK, BROKEN = False, True


class Vector(NamedTuple):
    format: str
    text: str
    content: str = ""
    calls: tuple[tuple[str, str, bool], ...] = ()
    reasoning: str = ""
    thinking: Thinking = Thinking.UNKNOWN


def call(arguments: str, broken: bool = OK, name: str = "f") -> tuple[str, str, bool]:
    return name, arguments, broken


V = Vector
VECTORS = {
    "verbatim arguments": V(
        "hermes", '<tool_call>{ "name" : "f" , "arguments" : { "s":"\\u00e9",\n "i" :1 } }</tool_call>',
        calls=(call('{ "s":"\\u00e9",\n "i" :1 }'),),
    ),
    "no line breaks": V("hermes", '<tool_call>{"name":"f","arguments":{}}</tool_call>', calls=(call("{}"),)),
    "two calls": V(
        "hermes",
        '<tool_call>{"name":"f","arguments":{}}</tool_call><tool_call>{"name":"f","arguments":{"i":2}}</tool_call>',
        calls=(call("{}"), call('{"i":2}')),
    ),
    "no end tag": V("hermes", '<tool_call>\n{"name": "f", "arguments": {"i": 1}}', calls=(call('{"i": 1}'),)),
    "no end tag between calls": V(
        "hermes", '<tool_call>{"name":"f","arguments":{}}\n<tool_call>{"name":"f","arguments":{}}</tool_call>',
        calls=(call("{}"), call("{}")),
    ),
    "arguments as text": V(
        "hermes", '<tool_call>{"name":"f","arguments":"{\\"s\\": \\"\\\\u00e9 \\ud83d\\ude00\\"}"}</tool_call>',
        calls=(call('{"s": "\\u00e9 😀"}'),),
    ),
    "arguments null": V("hermes", '<tool_call>{"name":"f","arguments":null}</tool_call>', calls=(call("{}"),)),
    "no arguments": V("hermes", '<tool_call>{"name":"f"}</tool_call>', calls=(call("{}"),)),
    "arguments first": V(
        "hermes", '<tool_call>{"arguments":{"s":"}"},"id":[{"a":"]"}],"name":"f"}</tool_call>',
        calls=(call('{"s":"}"}'),)
    ),
    "markup in a string": V(
        "hermes", '<tool_call>{"name":"f","arguments":{"s":"</tool_call>\\"}"}}</tool_call> ok', " ok",
        calls=(call('{"s":"</tool_call>\\"}"}'),),
    ),
    "text around calls": V(
        "hermes", 'Look.\n\n<tool_call>{"name":"f","arguments":{}}</tool_call>\n', "Look.", calls=(call("{}"),)
    ),
    "undeclared name": V(
        "hermes", 'Hm\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call> x',
        'Hm\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call> x',
    ),
    "undeclared, then declared": V(
        "hermes", '<tool_call>{"name": "g"}</tool_call><tool_call>{"name": "f"}</tool_call>',
        '<tool_call>{"name": "g"}</tool_call>', calls=(call("{}"),),
    ),
    "JSON in prose": V("hermes", 'Use {"name": "f", "arguments": {}}.', 'Use {"name": "f", "arguments": {}}.'),
    "cut in the name": V("hermes", '<tool_call>\n{"name": "f', '<tool_call>\n{"name": "f'),
    "cut in the arguments": V(
        "hermes", '<tool_call>{"name":"f","arguments":{"s":"a', calls=(call('{"s":"a', BROKEN),)
    ),
    "ended too early": V(
        "hermes", '<tool_call>{"name":"f","arguments":{"i":1</tool_call>', calls=(call('{"i":1', BROKEN),)
    ),
    "not an object": V("hermes", "<tool_call>f()</tool_call>", "<tool_call>f()</tool_call>"),
    "empty region": V("hermes", "<tool_call>\n</tool_call>", "<tool_call>\n</tool_call>"),
    "unfinished marker": V("hermes", "a <tool_ca", "a <tool_ca"),
    "bare object": V(
        "llama3_json", ' {"name": "f", "parameters": {"o": {"k": {"x": "}"}}}}',
        calls=(call('{"o": {"k": {"x": "}"}}}'),)
    ),
    "type before the name": V(
        "llama3_json", '{"type": "function", "name": "f", "parameters": {"i": 1}}', calls=(call('{"i": 1}'),)
    ),
    "called arguments": V("llama3_json", '{"name": "f", "arguments": {}}', calls=(call("{}"),)),
    "python tag": V(
        "llama3_json", '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "f", "parameters": {"i": 1}}',
        calls=(call("{}"), call('{"i": 1}')),
    ),
    "an answer in JSON": V("llama3_json", '{"city": "Rome", "name": "f"}', '{"city": "Rome", "name": "f"}'),
    "a name without parameters": V("llama3_json", '{"name": "f"}', '{"name": "f"}'),
    "a call in prose": V(
        "llama3_json", 'Say {"name": "f", "parameters": {}}', 'Say {"name": "f", "parameters": {}}'
    ),
    "a bare undeclared name": V(
        "llama3_json", '{"name": "g", "parameters": {"a": 1}}', '{"name": "g", "parameters": {"a": 1}}'
    ),
    "types of the schema": V(
        "qwen3_xml",
        "<tool_call>\n<function=f>\n<parameter=s>\n5\n</parameter>\n<parameter=i>\n5\n</parameter>\n"
        "<parameter=b>\nTrue\n</parameter>\n<parameter=u>\nnull\n</parameter>\n<parameter=x>\nword\n</parameter>\n"
        "</function>\n</tool_call>",
        calls=(call('{"s": "5", "i": 5, "b": true, "u": null, "x": "word"}'),),
    ),
    "line breaks of a value": V(
        "qwen3_xml",
        '<tool_call>\n<function=f>\n<parameter=s>\n\n a "b" </parameter \n\n</parameter>\n</function>\n</tool_call>',
        calls=(call('{"s": "\\n a \\"b\\" </parameter \\n"}'),),
    ),
    "no outer tag": V(
        "qwen3_xml", "Go.\n<function=f>\n<parameter=s>\nx\n</parameter>\n</function>\n</tool_call>", "Go.",
        calls=(call('{"s": "x"}'),),
    ),
    "tags left out": V(
        "qwen3_xml", "<tool_call>\n<function=f>\n<parameter=s>\nx\n<parameter=i>\n1\n</function>\n</tool_call>",
        calls=(call('{"s": "x", "i": 1}'),),
    ),
    "no end of the function": V(
        "qwen3_xml", "<tool_call>\n<function=f>\n<parameter=i>\n1\n</parameter>\n</tool_call>",
        calls=(call('{"i": 1}'),)
    ),
    "repeated key": V(
        "qwen3_xml", "<function=f><parameter=i>1</parameter><parameter=i>2</parameter></function>",
        calls=(call('{"i": 1, "i": 2}'),),
    ),
    "a number beyond those of Python": V("pythonic", "[f(n=-1e999)]", calls=(call('{"n": -1e999}'),)),
    "a tag in a string of JSON": V(
        "qwen3_xml", '<function=f>\n<parameter=o>\n {"a": "</parameter>\\""}\n</parameter>\n</function>',
        calls=(call('{"o": {"a": "</parameter>\\""}}'),),
    ),
    "an open string ends with its line": V(
        "qwen3_xml", '<function=f>\n<parameter=o>\n{"a": "</parameter>\n</parameter>\n</function>',
        calls=(call('{"o": "{\\"a\\": \\"</parameter>"}'),),
    ),
    "no parameters": V("qwen3_xml", "<function=no-arguments>\n</function>", calls=(call("{}", name="no-arguments"),)),
    "cut in a value": V(
        "qwen3_xml", "<function=f>\n<parameter=s>\nab", calls=(call('{"s": "ab', BROKEN),)
    ),
    "undeclared function": V("qwen3_xml", "<function=g>\n</function>", "<function=g>\n</function>"),
    "commas and brackets in strings": V(
        "pythonic", "[f(s=\"a, b) ]\", a=['it\\'s', 1,], o={'k': None}), get_weather(city='x')]",
        calls=(call('{"s": "a, b) ]", "a": ["it\'s", 1], "o": {"k": null}}'),
               call('{"city": "x"}', name="get_weather")),
    ),
    "unfinished list": V("pythonic", "[f(a=[1, 2", calls=(call('{"a": [1', BROKEN),)),
    "tagged": V("pythonic", "<|python_start|>[f(b=True)]<|python_end|>", calls=(call('{"b": true}'),)),
    "no keyword": V("pythonic", "[f(1)]", ")]", calls=(call("", BROKEN),)),
    "a name as a value": V("pythonic", "[f(s=x)]", ")]", calls=(call('{"s": ', BROKEN),)),
    "a list in prose": V("pythonic", "[1] f(x) says", "[1] f(x) says"),
    "an undeclared function": V("pythonic", "[g(x=1)]", "[g(x=1)]"),
    "a JSON list": V(
        "mistral", 'Ok[TOOL_CALLS] [{"name": "f", "arguments": {"a": ["]"]}}, {"arguments": {}, "name": "f"}]', "Ok",
        calls=(call('{"a": ["]"]}'), call("{}")),
    ),
    "name and arguments": V(
        "mistral", '[TOOL_CALLS]f[ARGS]{"s": "[TOOL_CALLS]"}[TOOL_CALLS]f[CALL_ID]abc[ARGS]{}[TOOL_CALLS]f{"i": 1}',
        calls=(call('{"s": "[TOOL_CALLS]"}'), call("{}"), call('{"i": 1}')),
    ),
    "fence in the arguments": V(
        "deepseek_v3",
        "A<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
        '{"s": "```\\n"}\n```<｜tool▁call▁end｜>',
        "A", calls=(call('{"s": "```\\n"}'),),
    ),
    "no section": V(
        "deepseek_v31", "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        calls=(call("{}"),)
    ),
    "second name undeclared": V(
        "deepseek_v31",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
        "<｜tool▁call▁begin｜>g<｜tool▁sep｜>{}",
        "<｜tool▁call▁begin｜>g<｜tool▁sep｜>{}", calls=(call("{}"),),
    ),
    "reasoning": V("hermes", "\n<think>\na\n\nb\n</think>\n\n  c\n", "  c\n", reasoning="a\n\nb"),
    "reasoning opened by the prompt": V("hermes", "a\n</think>\n\nb", "b", reasoning="a", thinking=Thinking.OPEN),
    "reasoning cut": V("hermes", "a <tool\n", reasoning="a <tool\n", thinking=Thinking.OPEN),
    "reasoning closed by the prompt": V("hermes", "a\nb", "a\nb", thinking=Thinking.CLOSED),
    "no reasoning": V("hermes", "\n a", "\n a"),
    "reasoning, then a call": V(
        "hermes", '<think>\nx\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', reasoning="x",
        calls=(call("{}"),),
    ),
    "a call ends reasoning": V(
        "qwen3_xml", "x\n<tool_call>\n<function=f>\n</function>\n</tool_call>", reasoning="x", calls=(call("{}"),),
        thinking=Thinking.OPEN,
    ),
    "reasoning, then a bare call": V(
        "llama3_json", '<think>x</think>\n{"name": "f", "parameters": {}}', reasoning="x", calls=(call("{}"),)
    ),
    "reasoning, then a bare answer": V("llama3_json", "<think>x</think>\n\nA", "A", reasoning="x"),
    "keys and values": V(
        "glm45",
        "Hm.\n<tool_call>f\n<arg_key>s</arg_key>\n<arg_value>\n5 <arg_key> \n</arg_value>\n<arg_key>i</arg_key>\n"
        '<arg_value>5</arg_value>\n<arg_key>o</arg_key>\n<arg_value>{"k": "</arg_value>"}</arg_value>\n</tool_call>',
        "Hm.", calls=(call('{"s": "\\n5 <arg_key> \\n", "i": 5, "o": {"k": "</arg_value>"}}'),),
    ),
    "keys without line breaks": V(
        "glm45",
        "<tool_call>no-arguments</tool_call><tool_call>f<arg_key>b</arg_key><arg_value>true</arg_value></tool_call>",
        calls=(call("{}", name="no-arguments"), call('{"b": true}')),
    ),
    "cut behind a key": V(
        "glm45", "<tool_call>f\n<arg_key>s</arg_key>\n<arg_value>a</arg", calls=(call('{"s": "a</arg', BROKEN),)
    ),
    "an undeclared name with keys": V(
        "glm45", "<tool_call>g\n<arg_key>s</arg_key>", "<tool_call>g\n<arg_key>s</arg_key>"
    ),
    "a name with an index": V(
        "kimi_k2",
        "Hm.\n<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
        '{"s": "<|tool_call_end|>"}<|tool_call_end|> <|tool_call_begin|> functions.no-arguments:11 '
        "<|tool_call_argument_begin|>\n{}\n<|tool_call_end|><|tool_calls_section_end|>",
        "Hm.", calls=(call('{"s": "<|tool_call_end|>"}'), call("{}", name="no-arguments")),
    ),
    "no section, no index, no end": V(
        "kimi_k2", '<|tool_call_begin|>f<|tool_call_argument_begin|>{"i": 1}', calls=(call('{"i": 1}'),)
    ),
    "an undeclared name with an index": V(
        "kimi_k2", "<|tool_call_begin|>functions.g:0<|tool_call_argument_begin|>{}<|tool_call_end|>",
        "<|tool_call_begin|>functions.g:0<|tool_call_argument_begin|>{}<|tool_call_end|>",
    ),
    "a section that ends reasoning": V(
        "kimi_k2", "Hm<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}",
        calls=(call("{}"),), reasoning="Hm", thinking=Thinking.OPEN,
    ),
    "channels": V(
        "harmony",
        "<|channel|>analysis<|message|>Hm, <b>.<|end|><|start|>assistant<|channel|>final<|message|>Hi\n\nyou<|return|>",
        "Hi\n\nyou", reasoning="Hm, <b>.",
    ),
    "a call behind reasoning": V(
        "harmony",
        "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>commentary to=functions.f "
        '<|constrain|>json<|message|>{"s": "<|end|>"}<|call|>',
        calls=(call('{"s": "<|end|>"}'),), reasoning="Hm",
    ),
    "the recipient first": V(
        "harmony", ' to=functions.f<|channel|>commentary json<|message|>{"i": 1}<|call|>', calls=(call('{"i": 1}'),)
    ),
    "the recipient behind the role": V(
        "harmony",
        "<|channel|>commentary<|message|>Let me see.<|end|><|start|>assistant to=functions.f<|channel|>commentary"
        "<|message|>{}",
        "Let me see.", calls=(call("{}"),),
    ),
    "a tool that is not declared": V("harmony", "<|channel|>commentary to=browser.open<|message|>{}<|call|>", "{}"),
    "a header that is cut": V("harmony", "<|channel|>analysis<|message|>Hm<|end|><|start|>assist", reasoning="Hm"),
    "no header": V("harmony", '{"a": "to=functions.f"}', '{"a": "to=functions.f"}'),
    "a call of a channel that is cut": V(
        "harmony", '<|channel|>commentary to=functions.f<|message|>{"s": "a<|call|>',
        calls=(call('{"s": "a<|call|>', BROKEN),)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VECTORS)
def test_vector_in_every_cut(name: str) -> None:
    vector = VECTORS[name]

    def read(pieces: list[str]) -> Read:
        return run(machine_of(vector.format, reasoning=THINK, thinking=vector.thinking), text_tokens(pieces))

    expected = Read(vector.content, vector.reasoning, vector.calls)
    assert read([vector.text]) == expected
    assert read(list(vector.text)) == expected
    for place in range(len(vector.text)):
        assert read(cut(vector.text, [place])) == expected


def test_marker_tokens_count_and_their_spelled_text_does_not() -> None:
    """A model that writes about a tag must not open a call by it."""
    ids = {"<tool_call>": 7, "</tool_call>": 8}
    spelled = text_tokens(["Write <tool_call>{", '"name": "f"}', "</tool_call>"])
    assert run(machine_of("hermes", ids), spelled).content == 'Write <tool_call>{"name": "f"}</tool_call>'
    tokens = [(7, ""), (0, '{"name": "f", "arguments": {"s": "'), (8, ""), (0, '"}}'), (8, ""), (8, "")]
    assert run(machine_of("hermes", ids), tokens) == Read("", "", (call('{"s": "</tool_call>"}'),))


def test_stray_marker_tokens_never_reach_content() -> None:
    ids = {"<tool_call>": 7, "</tool_call>": 8, "<think>": 9, "</think>": 10}
    tokens = [(10, ""), (0, "a"), (10, ""), (8, ""), (0, "b"), (9, "")]
    machine = machine_of("hermes", ids, reasoning=THINK, thinking=Thinking.CLOSED)
    assert run(machine, tokens) == Read("ab", "", ())


def test_reasoning_tokens_are_counted_with_their_markers() -> None:
    ids = {"<think>": 9, "</think>": 10}
    machine = machine_of("hermes", ids, reasoning=THINK)
    run(machine, [(9, ""), (0, "\n"), (0, "a"), (0, "b"), (10, ""), (0, "c")])
    assert machine.num_reasoning_tokens == 5


def test_ids_that_a_model_writes_are_those_of_its_calls() -> None:
    """Guards Kimi K2's history, which shows ids as names, and answers in which an index comes twice."""
    written = (f"<|tool_call_begin|>{each}<|tool_call_argument_begin|>{{}}" for each in ("functions.f:3", "f:4", "f"))
    text = "".join(written) + "<|tool_call_begin|>functions.f:3<|tool_call_argument_begin|>{}"
    events = machine_of("kimi_k2").push(0, text)
    ids = [event.id for event in events if isinstance(event, CallBegin)]
    assert ids == ["functions.f:3", "f:4", "id2", "id3"]


def test_calls_beyond_the_limit_are_dropped() -> None:
    text = '<tool_call>{"name":"f","arguments":{}}</tool_call>' * 3
    read = run(machine_of("hermes", max_calls=1), text_tokens(text))
    assert read == Read("", "", (call("{}"),))


@pytest.mark.parametrize(
    ("name", "text", "cut", "num_broken"),
    [
        ("hermes", '<tool_call>{"name":"f"</tool_call>', False, 1),
        ("hermes", '<tool_call>{"name":"f","arguments":{}}</tool_call>', False, 0),
        ("hermes", '<tool_call>{"name":"f","arguments":{"s":"a', False, 1),
        ("hermes", '<tool_call>{"name":"f","arguments":{"s":"a', True, 0),
        ("hermes", '<tool_call>{"name":"g","arguments":{}}</tool_call>', False, 1),
        ("hermes", '<tool_call>{"na', False, 1),
        ("hermes", '<tool_call>{"na', True, 0),
        ("hermes", "<tool_call>no call</tool_call>" * 2, False, 2),
        ("llama3_json", '{"a": 1}', False, 0),
        ("llama3_json", '<|python_tag|>{"a": 1}', False, 1),
        ("mistral", "[TOOL_CALLS] [", False, 1),
    ],
)
def test_broken_calls_are_counted(name: str, text: str, cut: bool, num_broken: int) -> None:
    """Guards against calls that fail in silence, and against counting answers that are none, or were cut."""
    machine = machine_of(name)
    machine.push(0, text)
    machine.finish(cut=cut)
    assert len(machine.broken_calls) == num_broken


def test_digests_of_broken_calls_are_of_their_first_characters() -> None:
    """Guards the log, in which calls that break alike look alike, and no text is seen."""

    def digest(value: str) -> str:
        machine = machine_of("hermes")
        machine.push(0, '<tool_call>{"name":"f","arguments":{"s":"' + value)
        machine.finish()
        return machine.broken_calls[0]

    assert digest("a" * 300) == digest("a" * 400) != digest("b" * 300)
