"""A cluster with KV in FP8: what is computed by one process, moved to another or read back from the store is one."""

from __future__ import annotations

from pathlib import Path

import torch

from baton.kvtransfer.blocks.pool import BlockPool
from baton.models.batch import Draw, Row
from baton.models.cpu.runner import ModelRunner
from baton.node.messages.control import SamplingSpec
from baton.node.modelhub import locate_model
from baton.tests.integration.cluster import Cluster
from baton.tests.integration.conftest import Oracle
from baton.tests.integration.prompts import LONG
from baton.worker.kv_layout import layout_of

MAX_TOKENS = 24
WORKERS = ("--kv-dtype", "fp8", "--store-loads", "always")


def of_one_process(prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens with the same KV."""
    torch.set_num_threads(1)
    runner = ModelRunner.load(locate_model("demo"), kv_dtype="fp8")
    pool = BlockPool(layout_of(runner.config, runner.kv_format, 16), 64)
    runner.bind_pool(pool.tensor, pool.scales)
    draw, found = Draw(SamplingSpec(max_tokens=MAX_TOKENS, temperature=0.0), (), 0, 0), []
    for prompt in prompts:
        known, start = list(prompt), 0
        while len(known) < len(prompt) + MAX_TOKENS:
            (drawn,) = runner.step([Row(known[start:], start, range(64), draw)])
            assert drawn is not None
            start = len(known)
            known += drawn.token_ids
        found.append(known[len(prompt) :])
    pool.close()
    return found


def test_answers_of_computed_moved_and_stored_kv_are_those_of_one_process(oracle: Oracle, tmp_path: Path) -> None:
    """Guards scales that are lost on the way of a block: over a plane, into shared memory, and back."""
    prompts = [oracle.tokenizer(prompt).input_ids for prompt in LONG[:3]]
    expected = [oracle.tokenizer.decode(tokens) for tokens in of_one_process(prompts)]
    with Cluster(1, 1, store_args=("--ram-gib", "0.1"), worker_args=WORKERS, log_folder=tmp_path) as cluster:

        def asked() -> list[str]:
            answers = [cluster.complete(prompt, max_tokens=MAX_TOKENS, ignore_eos=True) for prompt in prompts]
            return [answer["choices"][0]["text"] for answer in answers]

        assert asked() == expected
        cluster.wait_until(lambda: sum(cluster.worker_values("received_blocks_total").values()) > 0, "moved blocks")
        cluster.wait_idle()
        cluster.wait_until(lambda: cluster.store_value("ram_blocks") > 0, "blocks in the store")
        for name in ("prefill-0", "decode-0"):
            cluster.nodes.kill(name)
        cluster.nodes.revive()
        cluster.wait_until(lambda: list(cluster.worker_values("store_attached").values()) == [1.0, 1.0], "the workers")
        assert asked() == expected
        cluster.wait_until(lambda: sum(cluster.worker_values("prompt_tokens_ram_total").values()) > 0, "tokens of RAM")
