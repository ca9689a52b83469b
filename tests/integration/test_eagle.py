"""A cluster with an EAGLE-3 draft: its KV is a layer of the blocks that prefill sends, and tokens stay the same."""

from __future__ import annotations

from pathlib import Path

from baton.models.config import ModelConfig
from baton.tests.integration.cluster import Cluster
from baton.tests.integration.conftest import DEMO, MAX_TOKENS, Oracle
from baton.tests.integration.prompts import LONG
from baton.tests.unit.models.eagle_folders import random_draft


def test_answers_with_a_draft_are_those_without(oracle: Oracle, tmp_path: Path) -> None:
    """Guards against blocks of other sizes at the two ends, workers that start with a draft and do not draft, and
    drafts in flight in what another worker continues; between workers of one rank and of two."""
    random_draft(tmp_path / "draft", ModelConfig.from_folder(DEMO))
    speculate = ("--speculate", f"eagle:{tmp_path / 'draft'}")
    ranks = ("--tp", "2")
    with Cluster(worker_args=speculate, prefill_args=ranks, decode_step_s=0.025, log_folder=tmp_path) as cluster:
        cluster.nodes.add_worker("decode", "decode-1", *ranks)
        cluster.wait_workers("prefill-0", "decode-0", "decode-1")
        for prompt, (text, _) in zip(LONG[:1], oracle.answers(LONG[:1]), strict=True):
            for _ in range(2):  # the second time with a cached prefix
                answer = cluster.complete(prompt, max_tokens=MAX_TOKENS)
                assert answer["choices"][0]["text"] == text
        cluster.wait_until(lambda: sum(cluster.worker_values("received_blocks_total").values()) > 0, "moved blocks")
        before = cluster.worker_values("spec_decode_num_drafts_total")
        assert sum(before.values()) > 0
        seeded = {"max_tokens": 80, "temperature": 0.8, "seed": 7, "ignore_eos": True}
        streams = [cluster.begin(LONG[0], **seeded), cluster.begin(LONG[0], max_tokens=MAX_TOKENS)]
        cluster.wait_until(lambda: all(stream.num_chunks > 3 for stream in streams), "two streams")
        running = cluster.worker_values("running")
        cluster.nodes.kill(max((name for name in running if name[0] == "d"), key=running.__getitem__))
        first, second = [stream.join().text for stream in streams]
        assert first == cluster.complete(LONG[0], speculative=False, **seeded)["choices"][0]["text"]
        assert second == oracle.answers(LONG[:1])[0][0]
        assert cluster.counter("retries") > 0
