"""Grammars of requests compiled in a child: what is right, what is refused and by which words, and what never ends."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from msgspec.structs import replace
from tokenizers import Tokenizer

import baton
from baton.node.errors import BadRequest
from baton.proxy.text import bounded_process, grammar_check
from baton.proxy.text.grammar_check import GrammarCheck
from baton.proxy.text.grammar_request import GrammarRequest, Reasoning

TOKENIZER = Path(baton.__file__).parent / "models" / "demo" / "tokenizer.json"
VOCAB, END = 4096, 1


@pytest.fixture(scope="module", autouse=True)
def patience() -> Iterator[None]:
    """No limit of time but that of bombs: on a loaded machine a second of processor time takes a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammar_check, "WAIT_S", 600.0)
        patch.setattr(bounded_process, "WALL_LIMIT_S", 600.0)
        yield


@pytest.fixture(scope="module")
def check() -> Iterator[GrammarCheck]:
    made = GrammarCheck(TOKENIZER, VOCAB, (END,), cpu_limit_s=600.0)
    yield made
    made.close()


@pytest.fixture(scope="module")
def impatient() -> Iterator[GrammarCheck]:
    """For bombs."""
    made = GrammarCheck(TOKENIZER, VOCAB, (END,), cpu_limit_s=1.0)
    yield made
    made.close()


@pytest.fixture(scope="module")
def tokenizers() -> tuple[LLTokenizer, Tokenizer]:
    text = TOKENIZER.read_text()
    return LLTokenizer(text, n_vocab=VOCAB, eos_token=[END]), Tokenizer.from_str(text)


def asked(kind: str, text: Any, **options: Any) -> GrammarRequest:
    text = text if isinstance(text, str) else json.dumps(text)
    return GrammarRequest(kind, text, "p", **options)  # type: ignore[arg-type]


def compiled(check: GrammarCheck, kind: str, text: Any, **options: Any) -> str:
    return asyncio.run(check.compile(asked(kind, text, **options))).text


class Language:
    """The texts of a grammar."""

    def __init__(self, lark: str, tokenizers: tuple[LLTokenizer, Tokenizer]) -> None:
        self._ll, self._tokenizer = tokenizers
        self._matcher = LLMatcher(self._ll, lark, log_level=0)
        assert not self._matcher.is_error(), self._matcher.get_error()

    def has(self, text: str) -> bool:
        matcher = self._matcher.deep_copy()
        ids = self._ll.tokenize_str(text)
        return matcher.validate_tokens([*ids, END]) == len(ids) + 1

    def begins(self, text: str) -> bool:
        ids = self._ll.tokenize_str(text)
        return self._matcher.deep_copy().validate_tokens(ids) == len(ids)


A = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TAG = {
    "structures": [{"begin": "<function=f>", "schema": A, "end": "</function>"}],
    "triggers": ["<function="],
}


@pytest.mark.parametrize(
    ("kind", "text", "options", "inside", "outside"),
    [
        ("json", A, {}, ['{"a": 1}', '{"a":1}', '{\n  "a": 12\n}'], ['{"a": "1"}', '{"b": 1}', "{}", "1"]),
        ("json", A, {"compact": True}, ['{"a":1}'], ['{"a": 1}']),
        ("json", {"type": "object"}, {}, ["{}", '{"x": [1, {"y": null}]}'], ["[]", "{"]),
        ("json", {**A, "x-guidance": {"whitespace_flexible": False}}, {}, ['{"a": 1}'], []),
        ("regex", "[a-c]{2}/x", {}, ["ab/x", "cc/x"], ["a/x", "abc/x", "ab/xx"]),
        ("choice", ["yes", "no", 'sa"y\n', "über"], {}, ["yes", "no", 'sa"y\n', "über"], ["y", "yesno", ""]),
        ("grammar", 'start: "a" b+\nb: "x" | "y"', {}, ["ax", "ayxy"], ["a", "b"]),
        ("grammar", 'root ::= "a" [0-9]+', {}, ["a1", "a42"], ["a", "1"]),
        (
            "tags", TAG, {},
            ["some text", 'so <function=f>{"a": 1}</function> and so', '<function=f>{"a":1}</function>'],
            ['<function=f>{"b": 1}</function>', "<function=g>"],
        ),
        (
            "tags",
            {"format": {"type": "sequence", "elements": [
                {"type": "const_string", "value": "x="},
                {"type": "or", "elements": [{"type": "regex", "pattern": "[0-9]+"}, {"type": "json_schema",
                                                                                  "json_schema": A}]},
                {"type": "tag", "begin": "<t>", "content": {"type": "const_string", "value": "v"}, "end": "</t>"},
            ]}},
            {}, ["x=12<t>v</t>", 'x={"a": 1}<t>v</t>'], ["x=<t>v</t>", "x=12"],
        ),
    ],
)  # fmt: skip
def test_languages(
    check: GrammarCheck,
    tokenizers: tuple[LLTokenizer, Tokenizer],
    kind: str,
    text: Any,
    options: dict[str, Any],
    inside: list[str],
    outside: list[str],
) -> None:
    """Guards each surface: escapes, anchors, white space, text around tags."""
    language = Language(compiled(check, kind, text, **options), tokenizers)
    assert [each for each in inside if not language.has(each)] == []
    assert [each for each in outside if language.has(each)] == []


def test_white_space_in_json_is_bounded(check: GrammarCheck, tokenizers: tuple[LLTokenizer, Tokenizer]) -> None:
    """Guards against models that write white space up to the end of the context."""
    language = Language(compiled(check, "json", A), tokenizers)
    assert language.begins("{\n" + " " * 32) and not language.begins("{\n" + " " * 33)
    assert language.begins('{"a": ') and not language.begins('{"a":  ')
    assert language.begins("{\r\n\t") and not language.begins("{\n\n")


@pytest.mark.parametrize("form", [{}, {"indent": 2}, {"indent": 8}, {"indent": "\t"}, {"separators": (",", ":")}])
def test_white_space_of_printed_json_is_allowed(
    check: GrammarCheck, tokenizers: tuple[LLTokenizer, Tokenizer], form: dict[str, Any]
) -> None:
    """Guards the quality of answers: models write JSON as programs print it."""
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": A}}, "required": ["a"]}
    value = {"a": [{"a": 1}, {"a": 2}]}
    assert Language(compiled(check, "json", schema), tokenizers).has(json.dumps(value, **form))


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("json", {"type": "nonsense"}, "nonsense"),
        ("json", {"type": "array", "uniqueItems": True}, "uniqueItems"),
        ("json", {"not": {}}, "not"),
        ("json", {"$ref": "https://example.com/x"}, "example.com"),
        ("json", {"type": "string", "pattern": "(?=a)b"}, "look"),
        ("json", {"$ref": "#"}, "nothing fits"),
        ("regex", r"[^\s\S]", "nothing fits"),
        ("grammar", "start: start", "nothing fits"),
        ("regex", "(", "regex|parse|unclosed"),
        ("grammar", "hello", "GBNF"),
        ("grammar", "root ::= (", "GBNF"),
        ("grammar", "start: missing", "missing"),
        ("tags", {"structures": [], "triggers": ["a"]}, "structures"),
        ("tags", {"structures": [{"begin": "b", "schema": {}, "end": ""}], "triggers": ["a"]}, "trigger"),
        ("tags", {"format": {"type": "qwen"}}, "qwen"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(check: GrammarCheck, kind: str, text: Any, reason: str) -> None:
    """Guards against a schema whose keyword is ignored, so that invalid answers pass."""
    with pytest.raises(BadRequest) as raised:
        compiled(check, kind, text)
    assert re.search(reason, str(raised.value)), str(raised.value)
    assert raised.value.param == "p" and "\n" not in str(raised.value)


def test_a_lenient_request_ignores_keywords(check: GrammarCheck) -> None:
    assert compiled(check, "json", {"type": "array", "uniqueItems": True}, lenient=True)


def one_of(depth: int) -> Any:
    leaf: Any = {"type": "integer"}
    for _ in range(depth):
        leaf = {"oneOf": [{"type": "object", "properties": {"x": leaf}}, {"type": "array", "items": leaf}]}
    return leaf


BOMBS = {
    "oneOf": ("json", one_of(15)),
    "repeats": ("regex", "((a|b){1000}){1000}"),
    "repeats of repeats": ("regex", "((((a{99}){99}){99}){99}){99}"),
    "left recursion": ("grammar", "root ::= root root root"),
    "items": ("json", {"type": "array", "minItems": 10**6, "items": one_of(6)}),
    "references": ("json", {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
    "alternatives": ("regex", "(a?){500}a{500}"),
    "rules": ("grammar", "start: a0\n" + "\n".join(f"a{n}: a{n + 1} a{n + 1}" for n in range(60)) + "\na60: /x/"),
    "bounds": ("json", {"type": "string", "pattern": "^(a{0,50000}b{0,50000}){0,50000}$", "maxLength": 10**6}),
    "choices": ("choice", [f"{i:040d}" * 100 for i in range(900)]),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end(impatient: GrammarCheck, name: str) -> None:
    """Guards the proxy: refused or compiled, within the limits of a process that is replaced."""
    kind, text = BOMBS[name]
    try:
        compiled(impatient, kind, text)
    except BadRequest as error:
        assert str(error)
    assert compiled(impatient, "regex", "abc" + name[:1])


def test_the_first_grammar_finds_a_process_that_has_read_the_tokenizer(tmp_path: Path) -> None:
    """Guards the first request with a schema: the tokenizer of a large model takes a second."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(TOKENIZER.read_bytes())
    check = GrammarCheck(path, VOCAB, (END,))
    check.start_process().result(timeout=60)
    path.unlink()
    assert compiled(check, "regex", "[0-9]+")
    check.close()


@pytest.mark.parametrize(("kind", "text", "inside"), [("json", A, '{"a": 1}'), ("choice", ["yes", "no"], "yes")])
def test_reasoning_between_texts_is_part_of_the_grammar(
    check: GrammarCheck, tokenizers: tuple[LLTokenizer, Tokenizer], kind: str, text: Any, inside: str
) -> None:
    """Guards models whose markers are several tokens: workers know reasoning by tokens only."""
    asked = GrammarRequest(kind, text if isinstance(text, str) else json.dumps(text), "p")  # type: ignore[arg-type]
    for begun in (True, False):
        grammar = asyncio.run(check.compile(asked, Reasoning("[begin]", "[end]", begun=begun)))
        language = Language(grammar.text, tokenizers)
        opening = "" if begun else "[begin]"
        for reasoning in ("so [end", '{"a": 1}', "", "[begin]"):
            for blanks in ("", "\n", "\n\n"):
                assert language.has(f"{opening}{reasoning}[end]{blanks}{inside}")
        assert language.has(inside) is not begun
        assert not language.has(f"{opening}so") and not language.has(f"{opening}so[end]x")


def test_workers_know_reasoning_between_tokens(check: GrammarCheck) -> None:
    asked = GrammarRequest("regex", "[ab]", "p")
    reasoning = Reasoning("<think>", "</think>", begun=True, start_ids=(182,), end_ids=(183,), blank_ids=(203,))
    plain, begun = asyncio.run(check.compile(asked)), asyncio.run(check.compile(asked, reasoning))
    assert begun == replace(plain, begins_after=(183,), blank_ids=(203,))
    maybe = asyncio.run(check.compile(asked, dataclasses.replace(reasoning, begun=False)))
    assert maybe == replace(begun, opened_by=(182,))


def test_others_are_answered_while_a_bomb_is_compiled() -> None:
    """Guards against one hostile schema that holds up those of all others, and the event loop with them."""
    check = GrammarCheck(TOKENIZER, VOCAB, (END,), cpu_limit_s=600.0)
    schema = asked("json", {**A, "title": "unseen"})

    async def both() -> bool:
        await asyncio.gather(*(check.compile(asked("regex", text)) for text in ("x", "y")))  # both processes are up
        bomb = asyncio.create_task(check.compile(asked("json", one_of(16))))
        await asyncio.sleep(0)
        await check.compile(schema)
        first = not bomb.done()
        check.close()
        await asyncio.gather(bomb, return_exceptions=True)
        return first

    assert asyncio.run(both())


def test_verdicts_are_kept(check: GrammarCheck) -> None:
    """Guards the time to the first token of a schema that was seen before, right or wrong."""
    assert compiled(check, "json", A) is compiled(check, "json", A)
    for _ in range(2):
        with pytest.raises(BadRequest, match="nonsense"):
            compiled(check, "json", {"type": "nonsense"})


def test_kept_verdicts_are_bounded_by_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards memory: tools of a quarter of a megabyte, of 256 requests."""
    check = GrammarCheck(TOKENIZER, VOCAB, (END,))
    monkeypatch.setattr(grammar_check, "KEPT_CHARS", 100)
    compiled_texts: list[str] = []

    def compile_(question: tuple[GrammarRequest, Reasoning | None]) -> str:
        compiled_texts.append(question[0].text)
        return "x" * 30

    monkeypatch.setattr(check, "_compile", compile_)

    async def run() -> None:
        for text in ("a" * 10, "b" * 10, "a" * 10, "c" * 10, "a" * 10, "b" * 10, "d" * 200, "d" * 200):
            await check.compile(asked("regex", text))

    asyncio.run(run())
    check.close()
    assert [text[0] for text in compiled_texts] == ["a", "b", "c", "b", "d", "d"]
