"""EAGLE-3 drafts in a decode worker in this process: tokens are those of steps without, and good drafts are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.models.config import ModelConfig
from baton.node.messages.control import SamplingSpec
from baton.tests.unit.models.eagle_folders import random_draft, write_pair
from baton.tests.unit.worker.demo_worker import FOLDER, Answer, DemoWorker

PROMPT = [2, *range(300, 340), *range(300, 330)]
REQUESTS: dict[str, SamplingSpec] = {
    "greedy": SamplingSpec(max_tokens=60, temperature=0.0),
    "stops": SamplingSpec(max_tokens=28, temperature=0.0, stop_token_ids=tuple(range(0, 900, 7)), min_tokens=9),
    "seeded": SamplingSpec(max_tokens=60, temperature=0.9, seed=7, top_p=0.9),
    "penalised": SamplingSpec(max_tokens=20, temperature=0.8, seed=1, frequency_penalty=0.7),
}


@pytest.fixture(scope="module")
def off() -> dict[str, Answer]:
    return DemoWorker(400).answers(REQUESTS, PROMPT)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("draft")
    random_draft(folder, ModelConfig.from_folder(FOLDER))
    return folder


@pytest.mark.parametrize("num_blocks", [400, 12])
def test_tokens_with_and_without_a_draft_are_the_same(off, draft, num_blocks):
    """Guards against a draft's KV in the place of the model's, and entries of drafts that lie in blocks of others: with
    preemption, a cached prefix, and answers that another worker has begun."""
    worker = DemoWorker(num_blocks, speculate=f"eagle:{draft}", speculate_tokens=3)
    assert worker.answers(REQUESTS, PROMPT) == off
    counters = worker.role.counters
    assert (counters.preemptions > 0) == (num_blocks == 12)
    assert counters.spec_decode_num_drafts > 0
    known = {"greedy": off["greedy"].ids[:1], "seeded": off["seeded"].ids[:9]}
    found = worker.answers({name: REQUESTS[name] for name in known}, PROMPT, known)
    assert {name: (*known[name], *answer.ids) for name, answer in found.items()} == {
        name: off[name].ids for name in known
    }


@pytest.mark.parametrize("num_blocks", [60, 10])
def test_drafts_that_are_right_are_all_kept(tmp_path, num_blocks):
    """Guards against entries that have no block, are lost with preemption, or come from a cached prefix of which the
    last is of another token: the draft equals its model, so that each of its tokens is right."""
    write_pair(tmp_path / "model", tmp_path / "draft")
    requests = {
        "greedy": SamplingSpec(max_tokens=70, temperature=0.0),
        "seeded": SamplingSpec(max_tokens=70, temperature=0.9, seed=7),
    }
    prompt, options = [index % 58 for index in range(40)], {"folder": tmp_path / "model", "max_model_len": 200}
    off = DemoWorker(60, **options).answers(requests, prompt)
    worker = DemoWorker(num_blocks, **options, speculate=f"eagle:{tmp_path / 'draft'}", speculate_tokens=5)
    counters = worker.role.counters
    for _ in range(2):
        assert worker.answers(requests, prompt) == off
    assert (counters.preemptions > 0) == (num_blocks == 10)
    assert counters.spec_decode_num_accepted_tokens == counters.spec_decode_num_draft_tokens
    if num_blocks == 60:
        assert counters.spec_decode_num_accepted_tokens > 4.5 * counters.spec_decode_num_drafts
