"""What a grammar allows is what the machine reads: random walks through grammars, with real and with made-up markers.

The failures these tests guard against are forced answers that come out as text, arguments that do not fit their schema,
and calls beside the ones that are allowed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

import baton
from baton.node.errors import BadRequest
from baton.proxy.formats.envelopes import ENVELOPES
from baton.proxy.formats.grammar import CallableFunction, CallRules
from baton.proxy.formats.machine import FormatMachine
from baton.proxy.formats.markup import Thinking, make_markup
from baton.proxy.formats.tables import FORMATS
from baton.proxy.text.call_grammar import lark_of_request
from baton.proxy.text.call_request import CallRequest
from baton.proxy.text.grammar_request import GrammarRequest
from baton.tests.unit.proxy.formats.renderers import RENDERERS, TOOLS, Call, Read, markers_of, run

TOKENIZER = Path(baton.__file__).parent / "models" / "demo" / "tokenizer.json"
END = 1
MAX_STEPS = 1500
WALKS = 3
CLOSING = ('"', "}", "]", ")", "\n", "<", "/", ">", ",")

BOOK = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 12},
        "kind": {"type": "string", "enum": ["novel", 'a "poem"', "é\n"]},
        "pages": {"type": "integer", "minimum": 1, "maximum": 999},
        "price": {"type": "number", "minimum": 0, "maximum": 99},
        "sold": {"type": "boolean"},
        "note": {"anyOf": [{"type": "string", "maxLength": 8}, {"type": "null"}], "default": None},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 2},
        "author": {"$ref": "#/$defs/Person"},
    },
    "required": ["title", "author", "sold"],
    "additionalProperties": False,
    "$defs": {
        "Person": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 6},
                "born": {"type": ["integer", "null"], "maximum": 9},
            },
            "required": ["name"],
            "additionalProperties": False,
        }
    },
}
CODE = {
    "type": "object",
    "properties": {
        "day": {"type": "string", "format": "date"},
        "code": {"type": "string", "pattern": "^[a-f]{2}/[0-9]{2}$"},
        "some": {"type": "string", "pattern": "ab", "maxLength": 9},
        "text": {"type": ["string", "null"]},
        "more": {"title": "More", "anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
        "flag": {"type": ["boolean", "null"]},
    },
    "required": ["code", "flag"],
    "additionalProperties": False,
}
FUNCTIONS = [
    CallableFunction("book", BOOK, strict=True),
    CallableFunction("book.code", CODE, strict=True),
    CallableFunction("no-arguments", {"type": "object", "properties": {}, "additionalProperties": False}),
]
SCHEMAS: Mapping[str, Mapping[str, Any]] = {each.name: each.parameters for each in FUNCTIONS}


class Model:
    """A model that draws any token that a grammar allows, mostly one that comes to an end."""

    def __init__(self, marker_tokens: Sequence[str], *, special: bool) -> None:
        made = json.loads(TOKENIZER.read_text())
        vocab = made["model"]["vocab"]
        for each in made["added_tokens"]:  # the demo model has markers of its own
            vocab[f"<|{each['id']}|>"] = vocab.pop(each["content"])
            each["content"] = f"<|{each['id']}|>"
        first = max(each["id"] for each in made["added_tokens"]) + 1
        first = max(first, *made["model"]["vocab"].values()) + 1
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
        self.tokens = {marker: first + place for place, marker in enumerate(marker_tokens)}
        made["added_tokens"] += [{"id": each, "content": text, **flags} for text, each in self.tokens.items()]
        self.vocab_size = first + len(self.tokens)
        self.ll = LLTokenizer(json.dumps(made), n_vocab=self.vocab_size, eos_token=[END], slices=[])
        self.texts = [self.ll.decode_bytes([each]) for each in range(first)]
        closing = [text.decode(errors="replace").strip(" ")[:1] in CLOSING for text in self.texts]
        self._closing = np.array([*closing, *[True] * len(self.tokens)])
        self.special = {marker for marker, each in self.tokens.items() if self.ll.is_special_token(each)}

    def complaint(self, lark: str) -> str:
        matcher = LLMatcher(self.ll, lark, log_level=0)
        return str(matcher.get_error()) if matcher.is_error() else ""

    def ids(self, text: str) -> list[int]:
        return list(self.ll.tokenize_str(text))

    def takes(self, lark: str, text: str, *, ends: bool = True) -> bool:
        """Whether a text is one of the grammar's, or the beginning of one."""
        ids = self.ids(text) + [END] * ends
        return int(LLMatcher(self.ll, lark, log_level=0).validate_tokens(ids)) == len(ids)

    def walk(self, lark: str, source: random.Random, begins: str = "") -> list[int] | None:
        """The tokens of one answer; None if it is still going on."""
        matcher = LLMatcher(self.ll, lark, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        bits = allocate_token_bitmask(1, self.vocab_size)
        drawn = self.ids(begins)
        assert matcher.consume_tokens(drawn)
        for step in range(MAX_STEPS):
            if matcher.is_stopped():
                return drawn
            fill_next_token_bitmask(matcher, bits)
            allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")[: self.vocab_size])
            assert len(allowed), "a dead end"
            if END in allowed and (step > 200 or source.random() < 0.5):
                return drawn
            soon = allowed[self._closing[allowed]]
            token = int(source.choice(soon if len(soon) and source.random() < 0.6 else allowed))
            if token == END:
                return drawn
            drawn.append(token)
            assert matcher.consume_token(token), matcher.get_error()
        return None

    def pieces(self, ids: Sequence[int]) -> Iterator[tuple[int, str]]:
        """Each token with the text that it completes, as the detokenizer gives it to the machine."""
        held = b""
        for each in ids:
            if each >= len(self.texts):
                assert not held
                yield each, ""
                continue
            held += self.texts[each]
            try:
                text, held = held.decode(), b""
            except UnicodeDecodeError:
                text = ""
            yield each, text
        assert not held


def machine_of(name: str, model: Model, max_calls: int | None = None) -> FormatMachine:
    markup = make_markup(FORMATS[name], None, model.tokens)
    return FormatMachine(markup, Thinking.CLOSED, SCHEMAS, lambda index: f"id{index}", max_calls=max_calls)


PLAIN = Model([], special=False)


def models_of(name: str) -> list[Model]:
    """Markers as tokens of their own, special or not, and as text."""
    markers = [each for each in markers_of(name) if each[0] in "<[" and each[-1] in ">]" and "/p" not in each]
    markers += [each for tag in [ENVELOPES[name].tag] if tag for each in tag if each]
    tokens = list(dict.fromkeys(markers))
    return [Model(tokens, special=True), Model(tokens, special=False), PLAIN]


MODELS = {name: models_of(name) for name in ENVELOPES}


def lark_of(name: str, model: Model, content: GrammarRequest | None = None, **rules: Any) -> str:
    given = {"functions": FUNCTIONS, "forced": True, "one_call": FORMATS[name].one_call, **rules}
    bound = [True] * len(given["functions"])
    params = [f"tools.{place}.function.parameters" for place in range(len(bound))]
    asked = CallRequest(CallRules(name, model.tokens, **given), params, bound, content)
    return lark_of_request(CallRequest.from_text(asked.to_grammar_request().text), model.special, model.complaint)


def walks(name: str, model: Model, lark: str, begins: str = "", num_walks: int = WALKS) -> Iterator[Read]:
    source = random.Random(f"{name} {len(model.tokens)} {sorted(model.special)} {begins}")
    for _ in range(num_walks):
        ids = model.walk(lark, source, begins)
        if ids is not None:
            yield run(machine_of(name, model), model.pieces(ids))


def check_calls(read: Read) -> None:
    for name, arguments, broken in read.calls:
        assert not broken, read
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])


def first_marker(name: str) -> str:
    """What a call begins with in the middle of a text."""
    envelope = ENVELOPES[name]
    begins = (envelope.tag[0] if envelope.tag else "") + envelope.opens + envelope.before
    return next(each for each in FORMATS[name].states["content"].moves if begins.startswith(each))


every_model = pytest.mark.parametrize(("name", "place"), [(name, place) for name in ENVELOPES for place in range(3)])


@every_model
def test_forced_answers_are_calls(name: str, place: int) -> None:
    model = MODELS[name][place]
    found = list(walks(name, model, lark_of(name, model)))
    assert found
    for read in found:
        assert read.calls and read.content == "", read
        check_calls(read)


@every_model
def test_a_call_in_free_text_is_forced_from_its_marker_on(name: str, place: int) -> None:
    """Guards strict functions under `auto`: text is free, and no other call than these can come of it."""
    model = MODELS[name][place]
    lark = lark_of(name, model, forced=False)
    for begins in ("Let me see.\n", first_marker(name), f"So {first_marker(name)}"):
        found = list(walks(name, model, lark, begins, num_walks=2))
        for read in found:
            assert read.calls or begins[0] == "L"
            assert not any(marker in read.content for marker in FORMATS[name].states["content"].moves)
            check_calls(read)
    assert model.takes(lark, "") and model.takes(lark, "It is < 5 [see] {this}.\n")
    assert not model.takes(lark, first_marker(name) + "no call")


@pytest.mark.parametrize("written", [each for each, (name, _) in RENDERERS.items() if name in ENVELOPES])
@pytest.mark.parametrize("forced", [True, False])
def test_calls_as_templates_write_them_are_allowed(written: str, forced: bool) -> None:
    """Guards models against a form that they have not learnt."""
    name = written if written in FORMATS else RENDERERS[written][0]
    calls: list[Call] = [
        ("f", {"s": 'a "b"', "i": 3, "n": -0.5, "b": True, "a": [1, 2], "u": None}),
        ("get", {"s": "x"}),
    ]
    functions = [CallableFunction(each, TOOLS["f"]) for each, _ in calls]
    for model in MODELS[name]:
        lark = lark_of(name, model, functions=functions, forced=forced)
        text = RENDERERS[written][1](calls[:1] if FORMATS[name].one_call else calls)
        assert model.takes(lark, text), text


@pytest.mark.parametrize(("name", "first"), [("llama3_json", "{"), ("pythonic", "[")])
def test_calls_without_a_marker_are_known_by_their_first_character(name: str, first: str) -> None:
    model = MODELS[name][0]
    lark = lark_of(name, model, forced=False)
    assert not model.takes(lark, f"{first}1", ends=False) and not model.takes(lark, f" \n{first}1", ends=False)
    for read in walks(name, model, lark, first):
        assert read.calls and read.content == ""
        check_calls(read)


@pytest.mark.parametrize("name", ENVELOPES)
@pytest.mark.parametrize("place", [0, 2])
def test_content_of_a_form_in_place_of_calls(name: str, place: int) -> None:
    """Guards `response_format` beside tools: an answer is calls, or content of the form, and may be either."""
    model = MODELS[name][place]
    form = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    asked = GrammarRequest("json", json.dumps({**form, "additionalProperties": False}), "response_format")
    lark = lark_of(name, model, asked, forced=False)
    for begins in ("{", first_marker(name)):
        for read in walks(name, model, lark, begins, num_walks=2):
            assert bool(read.content) == (begins == "{") == (not read.calls), read
            if read.content:
                assert json.loads(read.content) in ({"ok": True}, {"ok": False})
            check_calls(read)
    for asked in (GrammarRequest("regex", "yes/no", "p"), GrammarRequest("choice", '["a", "yes/no"]', "p")):
        lark = lark_of(name, model, asked, forced=False)
        assert model.takes(lark, "yes/no") and model.takes(lark, first_marker(name), ends=False)
        assert not model.takes(lark, "yes")


@pytest.mark.parametrize("name", ENVELOPES)
def test_one_call_and_then_an_end(name: str) -> None:
    model = MODELS[name][0]
    for forced in (True, False):
        lark = lark_of(name, model, one_call=True, functions=FUNCTIONS[2:], forced=forced)
        for read in walks(name, model, lark, "" if forced else first_marker(name)):
            assert len(read.calls) == 1 and read.calls[0][0] == "no-arguments" and not read.content


@pytest.mark.parametrize("name", ENVELOPES)
def test_what_a_strict_function_asks_in_vain_is_named(name: str) -> None:
    """Guards against a keyword that is ignored in silence, and against an error that says not which function it is."""
    model = MODELS[name][0]
    bad = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    for strict, schema, word in (
        (True, bad, "uniqueItems"), (True, {"type": "object", "not": {}}, "not"),
        (False, {"type": "object", "properties": {"a": {"type": "nonsense"}}, "required": ["a"]}, "nonsense"),
    ):  # fmt: skip
        with pytest.raises(BadRequest, match=word) as raised:
            lark_of(name, model, functions=[*FUNCTIONS, CallableFunction("bad", schema, strict=strict)])
        assert raised.value.param == "tools.3.function.parameters" and "bad" in str(raised.value)
    assert lark_of(name, model, functions=[CallableFunction("bad", bad)])


@pytest.mark.parametrize("name", ENVELOPES)
def test_a_function_that_need_not_be_bound_takes_any_object_instead(name: str) -> None:
    """Guards agents with many tools against one odd schema among them."""
    model = MODELS[name][0]
    odd = CallableFunction("book", {"type": "object", "properties": {"a": {"pattern": "(?=a)b", "type": "string"}}})
    asked = CallRequest(CallRules(name, model.tokens, [odd, FUNCTIONS[1]], True, True), ["", ""], [False, True])
    lark = lark_of_request(asked, model.special, model.complaint)
    for read in (
        run(machine_of(name, model), model.pieces(ids)) for ids in [model.walk(lark, random.Random(1))] if ids
    ):
        assert read.calls and isinstance(json.loads(read.calls[0][1]), dict)


def test_no_reference_leads_nowhere() -> None:
    """Guards values that a model writes one by one, which become schemas of their own."""
    model = MODELS["qwen3_xml"][0]
    tree = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
    with pytest.raises(BadRequest, match="reference"):
        lark_of("qwen3_xml", model, functions=[CallableFunction("f", tree, strict=True)])
    assert lark_of("qwen3_xml", model, functions=[CallableFunction("f", tree)])


def test_strings_in_tags_are_the_schemas() -> None:
    """Guards raw text between tags against an end that is no end, and patterns that are searched, not matched."""
    model = MODELS["qwen3_xml"][0]

    def takes(schema: Any, value: str) -> bool:
        parameters = {"type": "object", "properties": {"s": schema}, "required": ["s"]}
        lark = lark_of("qwen3_xml", model, functions=[CallableFunction("f", parameters, strict=True)])
        text = f"<tool_call>\n<function=f>\n<parameter=s>\n{value}\n</parameter>\n</function>\n</tool_call>"
        return model.takes(lark, text)

    text = {"type": "string"}
    assert takes(text, "") and takes(text, 'a "b"\n\n</para') and takes(text, "<tool_call>") == (not model.special)
    assert not takes(text, "a</parameter>b") and not takes(text, "a\n</function>") and not takes(text, "<parameter=x>")
    assert takes({**text, "pattern": "b|^c$"}, "abc") and takes({**text, "pattern": "b|^c$"}, "c")
    assert not takes({**text, "pattern": "b|^c$"}, "cc") and takes({**text, "pattern": "^[|a]/$"}, "|/")
    assert takes({**text, "pattern": r"^\d[\w-]\S$"}, "1-é") and not takes({**text, "pattern": r"^\d$"}, "４")
    assert takes({**text, "format": "date"}, "2026-01-31") and not takes({**text, "format": "date"}, "2026-02-30")
    assert takes({**text, "minLength": 2, "maxLength": 3}, "abc") and not takes({**text, "minLength": 2}, "a")
    assert takes({**text, "const": "x\n"}, "x\n") and not takes({**text, "const": "x\n"}, "x")
