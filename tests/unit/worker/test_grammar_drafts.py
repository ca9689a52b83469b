"""Drafts beside grammars with the demo model in this process: tokens are those of steps without, in fewer steps."""

from __future__ import annotations

import json

import pytest

from baton.models.config import ModelConfig
from baton.node.messages.control import Grammar, SamplingSpec
from baton.tests.unit.models.eagle_folders import random_draft
from baton.tests.unit.worker.demo_worker import END_IDS, FOLDER, Answer, DemoWorker, adapter_refs

PROMPT = [2, *range(300, 340), *range(300, 330)]
KEYS = ("customer_identifier", "delivery_address", "preferred_language")
SCHEMA = {
    "type": "object",
    "properties": {
        KEYS[0]: {"type": "integer"},
        KEYS[1]: {"type": "string", "maxLength": 9},
        KEYS[2]: {"enum": ["fr"]},
    },
    "required": list(KEYS),
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
JSON = Grammar(text=f"start: %json {json.dumps(SCHEMA)}", end_ids=END_IDS)
LISTS = Grammar(
    text='start: %json {"type": "array", "items": {"type": "integer", "minimum": 7, "maximum": 8}}', end_ids=END_IDS
)
CALL = Grammar(
    text=f'start: "[call weather]" %json {json.dumps(SCHEMA)} "[end of call]"',
    end_ids=END_IDS,
    begins_after=(400,),
    max_reasoning=4,
)
WORDS = Grammar(text="start: /(red|green) and (black and white )+/", end_ids=END_IDS)


def spec(grammar: Grammar, **options) -> SamplingSpec:
    return SamplingSpec(**{"max_tokens": 50, "temperature": 0.0, "grammar": grammar} | options)


REQUESTS: dict[str, SamplingSpec] = {
    "schema": spec(JSON),
    "seeded": spec(JSON, temperature=0.9, seed=7),
    "lists": spec(LISTS, temperature=0.8, seed=3, frequency_penalty=0.3),
    "call": spec(CALL, temperature=1.1, seed=4, max_tokens=60),
    "words": spec(WORDS, temperature=0.7, seed=5, logprobs=True, top_logprobs=1),
    "cut": spec(JSON, max_tokens=9),
    "free": SamplingSpec(max_tokens=40, temperature=0.9, seed=7),
}


@pytest.fixture(scope="module")
def off() -> dict[str, Answer]:
    return DemoWorker(400).answers(REQUESTS, PROMPT)


@pytest.mark.parametrize(("drafts", "num_blocks"), [("ngram", 400), ("ngram", 14), ("eagle", 400)])
def test_tokens_with_and_without_drafts_are_the_same(off, tmp_path, drafts, num_blocks):
    """Guards against masks of another place or row, a grammar that drafts have advanced, and drafts behind an end: of
    schemas, lists, tool calls behind reasoning, and text, beside a free row; with preemption."""
    speculate = "ngram"
    if drafts == "eagle":
        random_draft(tmp_path, ModelConfig.from_folder(FOLDER))
        speculate = f"eagle:{tmp_path}"
    worker = DemoWorker(num_blocks, speculate=speculate, speculate_tokens=5)
    assert worker.answers(REQUESTS, PROMPT) == off
    assert (worker.role.counters.preemptions > 0) == (num_blocks == 14)
    known = {name: off[name].ids[:cut] for name, cut in (("schema", 1), ("seeded", 6), ("call", 30))}
    again = worker.answers({name: REQUESTS[name] for name in known}, PROMPT, known)  # another worker had begun them
    assert {name: (*known[name], *answer.ids) for name, answer in again.items()} == {
        name: off[name].ids for name in known
    }
    worker.role.report()
    assert worker.role.counters.spec_decode_accepted_grammar > 20


def test_forced_tokens_are_drafts_that_are_all_accepted():
    """Guards the gain: keys, quotes and brackets of a schema take few steps, though other drafts were all wrong."""
    requests = {"schema": REQUESTS["schema"]}
    plain, worker = DemoWorker(100), DemoWorker(100, speculate="ngram", speculate_tokens=15)
    answers = plain.answers(requests, PROMPT)
    assert worker.answers(requests, PROMPT) == answers
    counters = worker.role.counters
    worker.role.report()
    assert counters.spec_decode_accepted_grammar == counters.spec_decode_num_draft_tokens > 15
    assert counters.steps * 2 < plain.role.counters.steps


def test_other_drafts_are_verified_by_masks(off):
    """Guards drafts that no grammar forces: a prediction of the answer is accepted."""
    requests = {name: REQUESTS[name] for name in ("lists", "words")}
    worker = DemoWorker(100, speculate="ngram", speculate_tokens=5)
    assert worker.answers(requests, PROMPT, prediction=off["lists"].ids) == {name: off[name] for name in requests}
    assert worker.accepted_prediction > 5


def test_drafts_adapters_and_grammars_in_one_batch(tmp_path):
    """Guards against a row of a draft that has the adapter, or the mask, of another row, and a draft's forced tokens in
    the place of those of a row beside it."""
    names = ("schema a", "lists b", "words a", "free", "free a", "free b")
    requests, refs = {name: REQUESTS[name.split()[0]] for name in names}, adapter_refs(tmp_path)
    named = {name: refs[name[-1]] for name in names if " " in name}
    off = DemoWorker(200, max_loras=2).answers(requests, PROMPT, adapters=named)
    worker = DemoWorker(200, max_loras=2, speculate="ngram", speculate_tokens=5)
    assert worker.answers(requests, PROMPT, adapters=named) == off
    assert len({off[name].ids for name in names if name.startswith("free")}) == 3, "each adapter says something else"
    worker.role.report()
    counters = worker.role.counters
    assert counters.spec_decode_num_draft_tokens > counters.spec_decode_accepted_grammar > 10
