"""Greedy tokens of the whole disaggregated system equal those of `transformers`, for every way of serving."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from baton.tests.integration.cluster import Cluster
from baton.tests.integration.conftest import MAX_TOKENS, Oracle


def _answers(cluster: Cluster, prompts: list[str], at_once: int) -> list[tuple[str, int]]:
    def ask(prompt: str) -> tuple[str, int]:
        answer = cluster.complete(prompt, max_tokens=MAX_TOKENS)
        return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(ask, prompts))


def _total(cluster: Cluster, name: str, worker: str = "") -> float:
    """Sum of a worker counter of the proxy's metrics page."""
    lines = [line for line in cluster.metrics() if line.startswith(f"baton:worker_{name}{{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines if f'worker="{worker}' in line)


@pytest.fixture
def check(oracle: Oracle, prompts: list[str]):  # type: ignore[no-untyped-def]
    def run(cluster: Cluster, at_once: int, chosen: list[str] | None = None) -> None:
        chosen = chosen or prompts
        expected = dict(zip(prompts, oracle.answers(prompts), strict=True))  # of all in one batch
        for prompt, answer in zip(chosen, _answers(cluster, chosen, at_once), strict=True):
            assert answer == expected[prompt], prompt

    return run


def test_alone_at_once_and_again_with_prefix_hits(check, prompts: list[str], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Guards the whole path: one at a time; then 32 at once, when both sides find prefixes cached."""
    with Cluster(log_folder=tmp_path) as cluster:
        check(cluster, 1, prompts[::2])
        assert _total(cluster, "transfers_received_total") >= len(prompts[::2])
        check(cluster, 32)
        assert _total(cluster, "prefix_hits_tokens_total", "p") > 0
        assert _total(cluster, "prefix_hits_tokens_total", "d") > 0
        assert _total(cluster, "transfers_failed_total") == 0


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_prefill(check, prompts: list[str], chunk: int, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Guards chunk borders: inside a block, across blocks, several prompts in one step."""
    arguments = ("--max-chunk-tokens", str(chunk), "--max-num-batched-tokens", str(max(chunk * 3, 16)))
    with Cluster(prefill_args=arguments, log_folder=tmp_path) as cluster:
        check(cluster, 32, prompts[1::2])


@pytest.mark.parametrize("plane", ["zmq", "shm"])
def test_two_and_two_workers(check, prompts: list[str], plane: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Guards pairing: every prefill worker hands over to every decode worker, on each plane."""
    with Cluster(2, 2, worker_args=("--plane", plane), log_folder=tmp_path) as cluster:
        check(cluster, 32, prompts[1::2])
        for worker in ("prefill-0", "prefill-1"):
            assert _total(cluster, "transfers_sent_total", worker) > 0
        for worker in ("decode-0", "decode-1"):
            assert _total(cluster, "transfers_received_total", worker) > 0


def test_local_prefill_on_decode_workers(check, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Guards `auto`, the default: local and remote prefill at the same time give the same tokens."""
    with Cluster(1, 2, proxy_args=(), log_folder=tmp_path) as cluster:
        check(cluster, 32)
        assert cluster.counter("routed_local_sooner") > 0
        assert cluster.counter("routed_disaggregated") > 0


def test_preemption(check, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Guards recompute: a decode pool that is far too small for 32 sequences, a prefill pool that queues prompts."""
    small = ("--num-blocks", "48", "--spare-blocks", "0", "--max-model-len", "512")
    with Cluster(
        decode_args=small, prefill_args=("--num-blocks", "40", "--max-model-len", "512"), log_folder=tmp_path
    ) as cluster:
        check(cluster, 32)
        assert _total(cluster, "preemptions_total") > 0


def test_colocated(check, prompts: list[str], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Guards conditional disaggregation: a decode worker alone is a complete server."""
    with Cluster(
        0, 1, proxy_args=("--local-prefill", "always"), decode_args=("--max-chunk-tokens", "24"), log_folder=tmp_path
    ) as cluster:
        check(cluster, 32, prompts[1::2])
        assert _total(cluster, "transfers_received_total") == 0
