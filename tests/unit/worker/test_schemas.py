"""Two hundred schemas, answered by the demo model at temperature 2: what stops is valid, what is cut is a beginning.

The schemas are of the kinds that people send: parameters of functions, settings, records, recursive structures, and
families that vary one keyword. Two draws a schema: one as it comes, and one in which quotes and brackets are likelier,
so that more answers end.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from datetime import date
from typing import Any
from urllib.parse import urlsplit

import pytest
from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.validators import validator_for
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from baton.node.errors import BadRequest
from baton.node.messages.control import Grammar, SamplingSpec
from baton.proxy.text.grammar import lark_of
from baton.proxy.text.grammar_check import GrammarCheck
from baton.proxy.text.grammar_request import GrammarRequest
from baton.tests.unit.worker.demo_worker import END_IDS, FOLDER, Answer, DemoWorker
from baton.tests.unit.worker.schemas.documents import DOCUMENTS
from baton.tests.unit.worker.schemas.families import FAMILIES, REFUSED
from baton.tests.unit.worker.schemas.functions import FUNCTIONS
from baton.tests.unit.worker.schemas.structures import STRUCTURES

VOCAB = 4096
SCHEMAS = {**FAMILIES, **FUNCTIONS, **DOCUMENTS, **STRUCTURES}
TOKENIZER = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
PROMPT = TOKENIZER.encode("Once upon a time").ids
CLOSING = tuple(
    (token, 12.0) for text, token in TOKENIZER.get_vocab().items() if token in END_IDS or not set(text) - set('"]},')
)
FORMATS = FormatChecker(())


def _checks_format(name: str, passes: Callable[[str], object]) -> None:
    def check(value: object) -> bool:
        return not isinstance(value, str) or bool(passes(value))

    FORMATS.checks(name, ValueError)(check)


_TIME = r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_checks_format("date", date.fromisoformat)
_checks_format("time", re.compile(_TIME, re.I).fullmatch)
_checks_format(
    "date-time", lambda text: date.fromisoformat(text[:10]) and re.fullmatch(f"[Tt ]{_TIME}", text[10:], re.I)
)
_checks_format("duration", re.compile(r"P(?!$)(\d+W|(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+S)?)?)").fullmatch)
_checks_format("email", re.compile(r"[^@\s]+@[^@\s]+").fullmatch)
_checks_format("hostname", re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*").fullmatch)
_checks_format("uri", lambda text: urlsplit(text).scheme)
for _name in ("ipv4", "ipv6", "uuid"):
    FORMATS.checkers[_name] = Draft202012Validator.FORMAT_CHECKER.checkers[_name]


def asked(schema: Any, *, compact: bool = False) -> GrammarRequest:
    return GrammarRequest("json", json.dumps(schema), "schema", compact=compact)


def sampling(schema: Any, seed: int, *, compact: bool, closing: bool) -> SamplingSpec:
    return SamplingSpec(
        max_tokens=120 if closing else 64,
        temperature=2.0,
        seed=seed,
        logit_bias=CLOSING if closing else (),
        stop_token_ids=END_IDS,
        grammar=Grammar(text=lark_of(asked(schema, compact=compact)), end_ids=END_IDS),
    )


REQUESTS = {
    f"{name}, {'closing' if closing else 'plain'}": sampling(schema, number, compact=closing, closing=closing)
    for number, (name, schema) in enumerate(SCHEMAS.items())
    for closing in (False, True)
}


def schema_of(request: str) -> Any:
    return SCHEMAS[request.rpartition(", ")[0]]


@pytest.fixture(scope="module")
def answers() -> dict[str, Answer]:
    return DemoWorker(num_blocks=1024).answers(REQUESTS, PROMPT)


def faults_of(text: str, schema: Any) -> Iterator[str]:
    validator = validator_for(schema, Draft202012Validator)(schema, format_checker=FORMATS)
    try:
        yield from (error.message for error in validator.iter_errors(json.loads(text)))
    except ValueError as error:
        yield f"{error}: {text!r}"


def test_answers_that_stop_are_valid(answers: dict[str, Answer]) -> None:
    """Guards against an answer with finish_reason stop that its schema does not allow, judged by another library."""
    assert len(SCHEMAS) >= 200
    stopped = {name: answer for name, answer in answers.items() if answer.finish == "stop"}
    texts = {name: TOKENIZER.decode(answer.ids) for name, answer in stopped.items()}
    faults = {name: list(faults_of(text, schema_of(name))) for name, text in texts.items()}
    assert {name: found for name, found in faults.items() if found} == {}
    assert len(stopped) > 250 and len({name.rpartition(", ")[0] for name in stopped}) > 160


def test_answers_that_are_cut_are_beginnings(answers: dict[str, Answer]) -> None:
    """Guards against a mask that is another row's, or late: the text could then not go on."""
    tokens = LLTokenizer((FOLDER / "tokenizer.json").read_text(), VOCAB, list(END_IDS), [])
    cut = {name: answer for name, answer in answers.items() if answer.finish == "length"}
    for name, answer in cut.items():
        grammar = REQUESTS[name].grammar
        assert grammar is not None and len(answer.ids) == REQUESTS[name].max_tokens
        assert LLMatcher(tokens, grammar.text, log_level=0).validate_tokens(list(answer.ids)) == len(answer.ids), name
    assert len(cut) + sum(answer.finish == "stop" for answer in answers.values()) == len(REQUESTS)


def test_a_preempted_sequence_draws_the_same(answers: dict[str, Answer]) -> None:
    """Guards the matcher's place while a sequence gives up its KV and computes it again."""
    some = {name: request for name, request in REQUESTS.items() if answers[name].finish == "length"}
    some = dict(list(some.items())[:24])
    worker = DemoWorker(num_blocks=40)
    assert worker.answers(some, PROMPT) == {name: answers[name] for name in some}
    assert worker.role.counters.preemptions > 0


@pytest.fixture(scope="module")
def check() -> Iterator[GrammarCheck]:
    made = GrammarCheck(FOLDER / "tokenizer.json", VOCAB, END_IDS)
    yield made
    made.close()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enforced_is_named(check: GrammarCheck, name: str) -> None:
    """Guards against a schema that is enforced in part."""
    schema, reason = REFUSED[name]
    with pytest.raises(BadRequest) as raised:
        asyncio.run(check.compile(asked(schema)))
    assert reason in str(raised.value)
