"""Workers that are groups of processes: the tokens are those of one rank, and the loss of a rank is that of the worker.

One cluster for all: prefill on 2 ranks, a decode worker of one rank and one of 2, so KV goes to an equal and to another
size.
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
        cluster.wait_workers("prefill-0", "decode-0", "decode-1")
        yield cluster


def rank_of(cluster: Cluster, worker: str) -> int:
    """The process of a worker's rank 1."""
    return int(re.findall(r"rank_started rank=1 of=2 pid=(\d+)", cluster.nodes.log(worker))[-1])


def test_answers_are_those_of_one_rank(cluster: Cluster, oracle: Oracle) -> None:
    """Guards against ranks that disagree, and KV whose heads another rank looks for elsewhere."""
    streams = [cluster.begin(prompt, max_tokens=MAX_TOKENS) for prompt in SOME]
    assert [stream.join().text for stream in streams] == [text for text, _ in oracle.answers(SOME)]
    steps = cluster.worker_values("steps_total")
    assert steps["decode-0"] and steps["decode-1"], "both sizes have decoded"
    cluster.wait_idle()


def test_a_rank_that_dies_between_two_steps_ends_its_worker(cluster: Cluster) -> None:
    """Guards against a worker that goes on without a part of the model, and streams that end with it."""
    body = {"max_tokens": 60, "ignore_eos": True}
    streams = [cluster.begin(prompt, **body) for prompt in SOME[:4]]
    cluster.wait_until(lambda: all(stream.num_chunks > 3 or stream.ended for stream in streams), "tokens")
    os.kill(rank_of(cluster, "decode-1"), signal.SIGKILL)
    assert cluster.nodes.wait_end("decode-1") == 1
    cluster.nodes.forget("decode-1")
    texts = [stream.join().text for stream in streams]
    assert texts == [cluster.complete(prompt, **body)["choices"][0]["text"] for prompt in SOME[:4]]


def test_a_rank_that_is_frozen_ends_its_worker(cluster: Cluster) -> None:
    """Guards against a worker that waits for ever, and leaves the frozen process behind when it has ended."""
    frozen = rank_of(cluster, "prefill-0")
    os.kill(frozen, signal.SIGSTOP)
    assert cluster.nodes.wait_end("prefill-0") == 1
    assert "rank 1 does not answer" in cluster.nodes.log("prefill-0")
    assert not Path(f"/proc/{frozen}").exists()
    cluster.nodes.forget("prefill-0")
