"""EAGLE-3 drafts in a decode worker in this process: tokens are those of steps without, and good drafts are kept."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from msgspec.structs import replace

from baton.models.config import ModelConfig
from baton.node.counters import DecodeCounters
from baton.node.messages.control import SamplingSpec
from baton.tests.unit.models.eagle_folders import random_draft, write_pair
from baton.tests.unit.worker.demo_worker import FOLDER, Answer, DemoWorker, adapter_refs

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


def test_a_draft_beside_adapters(tmp_path):
    """Guards against entries of a draft that are made of hidden states of another row, lie in blocks of another
    adapter, or come from a cached prefix of the same prompt: the draft equals its model, so that each draft of a row
    without adapter is right, and rows of adapters keep as many beside others as apart; and with preemption."""
    model = tmp_path / "model"
    write_pair(model, tmp_path / "draft")
    refs, prompt = adapter_refs(tmp_path, model), [index % 58 for index in range(40)]
    options = {"folder": model, "max_model_len": 200, "max_loras": 2}
    kinds = {name: replace(REQUESTS[name], max_tokens=24) for name in ("greedy", "seeded")}
    requests = {f"{name} {kind}": kinds[kind] for name in ("base", *refs) for kind in kinds}
    named = {name: refs[name[0]] for name in requests if not name.startswith("base")}
    off = DemoWorker(80, **options).answers(requests, prompt, adapters=named)
    assert len({answer.ids for answer in off.values()}) == len(off), "each adapter says something else"

    def with_draft(names: Iterable[str], num_blocks: int = 80) -> DecodeCounters:
        """What a worker has counted that answered these requests twice, then with cached prefixes."""
        worker = DemoWorker(num_blocks, **options, speculate=f"eagle:{tmp_path / 'draft'}", speculate_tokens=5)
        for _ in range(2):
            found = worker.answers({name: requests[name] for name in names}, prompt, adapters=named)
            assert found == {name: off[name] for name in names}
        return worker.role.counters

    base, adapted, together = (with_draft(names) for names in (set(requests) - set(named), named, requests))
    assert base.spec_decode_num_accepted_tokens == base.spec_decode_num_draft_tokens > 0
    for count in ("spec_decode_num_accepted_tokens", "spec_decode_num_draft_tokens"):
        assert getattr(together, count) == getattr(base, count) + getattr(adapted, count)
    assert with_draft(requests, 14).preemptions > 0
