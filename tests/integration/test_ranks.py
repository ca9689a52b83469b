"""Workers that are groups of processes: the tokens are those of one process, and the loss of one is that of the worker.

One cluster for all: prefill on 2 ranks and in 2 stages, a decode worker of one rank and one of 2, so KV goes to an
equal and to another size, and from pools of stages.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.tests.integration.cluster import Cluster
from baton.tests.integration.conftest import MAX_TOKENS, Oracle
from baton.tests.integration.prompts import PROMPTS

SOME = PROMPTS[::4]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(prefill_args=("--tp", "2"), log_folder=tmp_path_factory.mktemp("logs")) as cluster:
        cluster.nodes.add_worker("decode", "decode-1", "--tp", "2")
        cluster.nodes.add_worker("prefill", "prefill-1", "--tp", "1", "--pp", "2", "--max-chunk-tokens", "16")
        cluster.wait_workers("prefill-0", "prefill-1", "decode-0", "decode-1")
        yield cluster


def rank_of(cluster: Cluster, worker: str) -> int:
    """The process of a worker's rank 1."""
    return int(re.findall(r"rank_started rank=1 of=2 pid=(\d+)", cluster.nodes.log(worker))[-1])


def stage_of(cluster: Cluster, worker: str) -> int:
    """The process of a worker's second stage."""
    return int(re.findall(r"stage_started stage=1 of=2 layers=\d+ pid=(\d+)", cluster.nodes.log(worker))[-1])


def test_answers_are_those_of_one_process(cluster: Cluster, oracle: Oracle) -> None:
    """Guards against ranks that disagree, KV whose heads another rank looks for elsewhere, and layers of a stage that
    get to no decode worker."""
    streams = [cluster.begin(prompt, max_tokens=MAX_TOKENS) for prompt in SOME]
    assert [stream.join().text for stream in streams] == [text for text, _ in oracle.answers(SOME)]
    steps = cluster.worker_values("steps_total")
    assert all(steps[f"{role}-{number}"] for role in ("prefill", "decode") for number in (0, 1)), "all have computed"
    cluster.wait_idle()


def test_a_stage_that_dies_in_mid_transfer_ends_its_worker(cluster: Cluster) -> None:
    """Guards against a worker that goes on without some layers, requests that are lost with it, and KV of which a part
    never came. Chunks are offered to decode while the next ones are in flight."""
    before = cluster.worker_values("steps_total")["prefill-1"]
    prompts = [f"{number} " + " ".join(SOME * 8)[:3000] for number in range(6)]
    streams = [cluster.begin(prompt, max_tokens=4) for prompt in prompts]
    cluster.wait_until(lambda: cluster.worker_values("steps_total")["prefill-1"] > before + 3, "steps")
    os.kill(stage_of(cluster, "prefill-1"), signal.SIGKILL)
    assert cluster.wait_end("prefill-1") == 1
    cluster.nodes.forget("prefill-1")
    texts = [stream.join().text for stream in streams]
    assert texts == [cluster.complete(prompt, max_tokens=4)["choices"][0]["text"] for prompt in prompts]
    assert cluster.counter("retries"), "it had prompts"
    cluster.wait_idle()


def test_a_rank_that_dies_between_two_steps_ends_its_worker(cluster: Cluster) -> None:
    """Guards against a worker that goes on without a part of the model, and streams that end with it."""
    body = {"max_tokens": 60, "ignore_eos": True}
    streams = [cluster.begin(prompt, **body) for prompt in SOME[:4]]
    cluster.wait_until(lambda: all(stream.num_chunks > 3 or stream.ended for stream in streams), "tokens")
    os.kill(rank_of(cluster, "decode-1"), signal.SIGKILL)
    assert cluster.wait_end("decode-1") == 1
    cluster.nodes.forget("decode-1")
    texts = [stream.join().text for stream in streams]
    assert texts == [cluster.complete(prompt, **body)["choices"][0]["text"] for prompt in SOME[:4]]


def test_a_rank_that_is_frozen_ends_its_worker(cluster: Cluster) -> None:
    """Guards against a worker that waits for ever, and leaves the frozen process behind when it has ended."""
    frozen = rank_of(cluster, "prefill-0")
    os.kill(frozen, signal.SIGSTOP)
    assert cluster.wait_end("prefill-0") == 1
    assert "rank 1 does not answer" in cluster.nodes.log("prefill-0")
    assert not Path(f"/proc/{frozen}").exists()
    cluster.nodes.forget("prefill-0")
