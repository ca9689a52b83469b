"""worker.grammars and worker.constraint with the demo model's tokenizer: compiled off the loop, masks, phases."""

from __future__ import annotations

import json
import os
import queue
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

import baton
import baton.worker.grammars
from baton.node.messages.control import Grammar
from baton.worker.constraint import Constraint, GrammarCompiled
from baton.worker.grammar_tokenizer import loading_grammar_tokenizer
from baton.worker.grammars import GrammarCompiler

TOKENIZER = Path(baton.__file__).parent / "models" / "demo" / "tokenizer.json"
VOCAB, END = 4096, 1
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "s": {"type": "string", "maxLength": 4}},
    "required": ["n", "s"],
    "additionalProperties": False,
}
OBJECT = Grammar(text=f"start: %json {json.dumps(SCHEMA)}", end_ids=(END,))
THINK, ANSWER, BLANK = 17, 23, 29
"""Tokens that stand for the markers of reasoning, and the line break behind it."""


class Bench:
    def __init__(self, mask_threads: int = 1, path: Path = TOKENIZER, ends: Sequence[int] = (END,)) -> None:
        self.events: queue.SimpleQueue[GrammarCompiled] = queue.SimpleQueue()
        with loading_grammar_tokenizer(path, VOCAB, ends) as tokenizer:
            self.grammars = GrammarCompiler(tokenizer, VOCAB, self.events.put, mask_threads)

    def constraint(self, grammar: Grammar) -> Constraint:
        (found,) = self.constraints(grammar, 1)
        return found

    def constraints(self, grammar: Grammar, number: int) -> list[Constraint]:
        """Of sequences that arrive at once."""
        found = [self.grammars.compile(grammar) for _ in range(number)]
        while None in found:
            event = self.events.get(timeout=60)  # or that of an earlier one, which was there at once
            assert not event.error
            if event.grammar == grammar:
                found = [each or self.grammars.constraint(event) for each in found]
        return [each for each in found if each is not None]

    def allowed(self, *constraints: Constraint) -> list[set[int]]:
        bits = np.unpackbits(self.grammars.masks(constraints).view(np.uint8), axis=1, bitorder="little")
        return [set(np.flatnonzero(row[:VOCAB]).tolist()) for row in bits]


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


def test_any_walk_through_the_masks_is_valid_json(bench: Bench) -> None:
    """Guards the order of bits, the end token, and masks of several sequences in one call."""
    draws = random.Random(3)
    texts: list[list[int]] = [[] for _ in range(6)]
    constraints = {number: bench.constraint(OBJECT) for number in range(6)}
    for _ in range(200):
        for (number, constraint), allowed in zip(
            list(constraints.items()), bench.allowed(*constraints.values()), strict=True
        ):
            token = END if END in allowed else draws.choice(sorted(allowed))
            constraint.advance((token,))
            assert not constraint.is_broken
            if token == END:
                del constraints[number]
            else:
                texts[number].append(token)
        if not constraints:
            break
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    for number in set(range(6)) - set(constraints):
        value = json.loads(tokenizer.decode(texts[number]))
        assert set(value) == {"n", "s"} and isinstance(value["n"], int) and len(value["s"]) <= 4
    assert len(constraints) < 6


def test_only_an_end_follows_a_complete_text(bench: Bench) -> None:
    """Guards a grammar whose text cannot go on: the library stops by itself, before an end was drawn."""
    grammar = Grammar(text='start: "a"', end_ids=(END, 0))
    constraint = bench.constraint(grammar)
    constraint.advance((Tokenizer.from_file(str(TOKENIZER)).token_to_id("a"),))
    assert bench.allowed(constraint) == [{END, 0}]
    other = bench.constraint(grammar)
    other.advance((Tokenizer.from_file(str(TOKENIZER)).token_to_id("a"), 300))
    assert other.is_broken
    constraint.advance((0,))
    assert not constraint.is_broken


def test_sequences_at_once_share_no_lexer_while_there_are_threads() -> None:
    """Guards the threads that make masks: a lexer is used by one at a time, so copies of one matcher would queue."""
    bench = Bench(mask_threads=3)
    three = bench.constraints(OBJECT, 3)
    assert len({each.lexer for each in three}) == 3
    assert bench.allowed(*three)[0] == bench.allowed(three[2])[0]
    more = [*three, *bench.constraints(OBJECT, 3)]
    assert sorted([each.lexer for each in more].count(lexer) for lexer in {each.lexer for each in more}) == [2, 2, 2]


def test_sequences_one_after_the_other_share_a_matcher() -> None:
    """Guards memory, and the time to the first token: nothing is compiled again while a matcher is unused."""
    bench = Bench(mask_threads=3)
    assert len({bench.constraint(OBJECT).lexer for _ in range(4)}) == 1
    counters = bench.grammars.counters
    assert (counters.grammar_requests, counters.grammar_hits, counters.grammars_compiled) == (4, 3, 1)
    assert counters.grammar_compile_seconds > 0


def test_a_matcher_that_is_there_is_not_waited_for() -> None:
    """Guards against a sequence that waits for an event that was taken already."""
    bench = Bench(mask_threads=2)
    held = bench.constraint(OBJECT)
    waiting = bench.grammars.compile(OBJECT)
    assert waiting is None
    found, last = bench.grammars.constraint(bench.events.get(timeout=60)), bench.grammars.compile(OBJECT)
    assert found is not None and last is not None and found.lexer != held.lexer


def test_more_grammars_at_once_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against sequences whose grammars push one another out before they get them, until their deadlines."""
    monkeypatch.setattr(baton.worker.grammars, "MAX_COMPILED", 2)
    bench = Bench()
    grammars = [Grammar(text=f'start: "{number}"', end_ids=(END,)) for number in range(6)]
    waiting = {grammar for grammar in grammars if bench.grammars.compile(grammar) is None}
    while waiting:
        event = bench.events.get(timeout=60)
        assert event.grammar not in waiting or bench.grammars.constraint(event) is not None
        waiting.discard(event.grammar)


def test_each_sequence_has_its_own_state(bench: Bench) -> None:
    """Guards against two sequences of one schema that advance one matcher."""
    first, second = bench.constraint(OBJECT), bench.constraint(OBJECT)
    before = bench.allowed(second)
    first.advance((min(before[0]),))
    assert bench.allowed(second) == before and bench.allowed(first) != before


@pytest.mark.parametrize("ends", [(), (END,), (2, 5)])
def test_the_tokens_that_end_a_text_are_those_of_the_grammar(bench: Bench, ends: tuple[int, ...]) -> None:
    """Guards an answer's end against a model's configuration that names other tokens than its tokenizer does: it may
    end where the grammar says so, and nowhere else."""
    grammar = Grammar(text='start: "a" "b"? /[^c]/?', end_ids=(END, 7))
    other = Bench(ends=ends)
    a = Tokenizer.from_file(str(TOKENIZER)).token_to_id("a")
    for path in ([], [a]):
        expected, found = bench.constraint(grammar), other.constraint(grammar)
        for constraint in (expected, found):
            constraint.advance(path)
        allowed = other.allowed(found)[0]
        assert allowed - {*ends, 0, 1} == bench.allowed(expected)[0] - {*ends, 0, 1}
        assert {END, 7} & allowed == ({END, 7} if path else set())
        assert not ({*ends[:1]} - {END}) & allowed


@pytest.mark.parametrize("is_pipe", [False, True])
def test_without_a_tokenizer_each_grammar_fails(tmp_path: Path, is_pipe: bool) -> None:
    """Guards a worker of a folder without tokenizer.json, or with one whose reading never ends: it starts, and requests
    with grammars have an answer."""
    if is_pipe:
        os.mkfifo(tmp_path / "tokenizer.json")
    other = Bench(path=tmp_path / "tokenizer.json")
    assert other.grammars.compile(OBJECT) is None
    assert "tokenizer.json" in other.events.get(timeout=60).error


def test_a_grammar_that_cannot_be_compiled_says_why(bench: Bench) -> None:
    """Guards the request: it fails with the library's words, and the thread lives on."""
    bad = Grammar(text='start: %json {"type": "nonsense"}', end_ids=(END,))
    assert bench.grammars.compile(bad) is None
    events = iter(lambda: bench.events.get(timeout=60), None)
    assert "nonsense" in next(event.error for event in events if event.grammar == bad)
    assert bench.constraint(OBJECT) is not None


def test_a_token_that_is_not_allowed_breaks_the_constraint(bench: Bench) -> None:
    """Guards against a peer of another library version: its token must not be taken for part of the answer."""
    constraint = bench.constraint(OBJECT)
    wrong = min(set(range(VOCAB)) - bench.allowed(constraint)[0])
    constraint.advance((wrong,))
    assert constraint.is_broken
    assert bench.allowed(constraint) == [set(range(VOCAB))]  # what is drawn of it is dropped


@pytest.mark.parametrize("opened_by", [(), (THINK,)])
def test_reasoning_is_free_and_the_grammar_begins_behind_it(bench: Bench, opened_by: tuple[int, ...]) -> None:
    """Guards against a grammar that swallows the reasoning, and one that never begins."""
    plain = bench.allowed(bench.constraint(OBJECT))[0]
    grammar = Grammar(text=OBJECT.text, end_ids=(END,), begins_after=(ANSWER,), opened_by=opened_by, blank_ids=(BLANK,))
    constraint, free = bench.constraint(grammar), set(range(VOCAB)) - {END}
    assert bench.allowed(constraint)[0] == (plain | {THINK} if opened_by else free)
    constraint.advance((THINK, 400, BLANK, 500))
    assert bench.allowed(constraint)[0] == free
    constraint.advance((ANSWER,))
    assert bench.allowed(constraint)[0] == plain | {BLANK}
    constraint.advance((BLANK,))
    assert bench.allowed(constraint)[0] == plain | {BLANK}
    constraint.advance((BLANK,))
    assert bench.allowed(constraint)[0] == plain and not constraint.is_broken
    constraint.advance((THINK,))
    assert constraint.is_broken == (THINK not in plain)


@pytest.mark.parametrize(("opened_by", "opening"), [((), ()), ((THINK,), (THINK,))])
def test_reasoning_ends_where_it_has_a_bound(
    bench: Bench, opened_by: tuple[int, ...], opening: tuple[int, ...]
) -> None:
    """Guards answers of models that reason without end; a bound of 0 is no reasoning at all."""
    free = set(range(VOCAB)) - {END}
    for most in (0, 2):
        grammar = Grammar(
            text=OBJECT.text, end_ids=(END,), begins_after=(ANSWER,), opened_by=opened_by, max_reasoning=most
        )
        constraint = bench.constraint(grammar)
        constraint.advance(opening)
        for _ in range(most):
            assert bench.allowed(constraint)[0] == free
            constraint.advance((400,))
        assert bench.allowed(constraint)[0] == {ANSWER}
        constraint.advance((ANSWER,))
        assert bench.allowed(constraint) == bench.allowed(bench.constraint(OBJECT)) and not constraint.is_broken


def test_no_blank_has_to_follow_reasoning(bench: Bench) -> None:
    """Guards against a grammar that loses its first token."""
    grammar = Grammar(text=OBJECT.text, end_ids=(END,), begins_after=(ANSWER,), blank_ids=(BLANK,))
    plain, behind = bench.constraint(OBJECT), bench.constraint(grammar)
    first = min(bench.allowed(plain)[0])
    plain.advance((first,))
    behind.advance((ANSWER, first))
    assert bench.allowed(plain) == bench.allowed(behind)


def test_reasoning_that_may_be_left_out_is_over_with_the_first_other_token(bench: Bench) -> None:
    grammar = Grammar(text=OBJECT.text, end_ids=(END,), begins_after=(ANSWER,), opened_by=(THINK,))
    plain, skipping = bench.constraint(OBJECT), bench.constraint(grammar)
    first = min(bench.allowed(plain)[0])
    for each in (plain, skipping):
        each.advance((first,))
    assert bench.allowed(plain) == bench.allowed(skipping)


@pytest.mark.parametrize("opened_by", [(), (THINK,)])
def test_masks_behind_drafts_are_those_of_one_token_after_the_other(bench: Bench, opened_by: tuple[int, ...]) -> None:
    """Guards drafts: through reasoning and its end, forced tokens, a complete text, ends that end nothing, and wrong
    drafts; the matcher is where it was then."""
    grammar = Grammar(
        text=OBJECT.text, end_ids=(END, 7), begins_after=(ANSWER,), opened_by=opened_by, blank_ids=(BLANK,)
    )
    draws = random.Random(5)
    single, ahead, other = bench.constraint(grammar), bench.constraint(grammar), bench.constraint(OBJECT)
    path, allowed = [*opened_by, 400, 401, ANSWER, BLANK], []
    while path[-3:] != [END] * 3:
        for token in path[len(allowed) :]:
            allowed.append(bench.allowed(single)[0])
            single.advance((token,))
        now = bench.allowed(single)[0]
        path.append(END if END in now else draws.choice(sorted(now - {BLANK, 7})))
    allowed.append(bench.allowed(single)[0])
    num_forced, place = 0, 0
    while place < len(path):
        drafts = path[place : place + draws.randint(0, 7)]
        wrong = draws.randint(0, 9)
        if wrong < len(drafts):
            drafts[wrong] = min(set(range(VOCAB)) - allowed[place + wrong])
        masks = bench.grammars.masks([ahead, other], [drafts, ()])
        found = [set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()) for mask in masks]
        assert len(found) == len(drafts) + 2
        reached = next((number for number, token in enumerate(drafts) if token != path[place + number]), len(drafts))
        expected = allowed[place : place + reached + 1]
        assert found[: len(expected)] == expected
        assert all(found)
        assert found[-1] == bench.allowed(other)[0]
        forced = list(ahead.forced)
        assert path[place : place + len(forced)] == forced
        num_forced = max(num_forced, len(forced))
        taken = path[place : place + max(1, reached)]
        ahead.advance(taken)
        place += len(taken)
    assert num_forced > 1 and not ahead.is_broken
