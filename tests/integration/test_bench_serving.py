"""The load generator against a real cluster: its counts equal the server's, and it leaves no work behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.benchmark.load.serving import serving
from baton.benchmark.load.settings import ServingSettings
from baton.tests.integration.cluster import Cluster

SMALL = {"num_prompts": 8, "num_warmups": 0, "random_input_len": 40, "random_output_len": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


async def result_of(cluster: Cluster, folder: Path, **more: object) -> dict[str, object]:
    """The JSON of a small run, which must succeed."""
    settings = ServingSettings(base_url=cluster.url, save_detailed=True, result_dir=folder, **{**SMALL, **more})  # type: ignore[arg-type]
    assert await serving(settings, []) == 0
    return dict(json.loads(next(folder.glob("*.json")).read_text()))


def counted(cluster: Cluster, name: str) -> float:
    """A counter of the proxy's metrics page."""
    found = [line for line in cluster.metrics() if line.startswith(f"vllm:{name}_total{{")]
    return sum(float(line.rpartition(" ")[2]) for line in found)


async def test_its_token_sums_are_the_servers(cluster: Cluster, tmp_path: Path) -> None:
    """Guards throughput figures against a client that loses or doubles tokens."""
    before = {name: counted(cluster, name) for name in ("prompt_tokens", "generation_tokens")}
    result = await result_of(cluster, tmp_path, request_rate=("20",), max_concurrency=4)
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (8, 0, 96)
    assert result["total_input_tokens"] == 8 * 40 and result["tokens_counted_by"] == "server"
    assert result["output_lens"] == [12] * 8 and result["model_id"] == "demo"
    assert counted(cluster, "prompt_tokens") - before["prompt_tokens"] == 320
    assert counted(cluster, "generation_tokens") - before["generation_tokens"] == 96


async def test_conversations_hit_the_prefix_cache(cluster: Cluster, tmp_path: Path) -> None:
    """Guards against turns whose prompt does not extend the previous one and so never hits the cache."""
    chats = {"backend": "openai-chat", "turns": 3, "num_prompts": 2, "tokenizer": "demo"}
    result = await result_of(cluster, tmp_path, **chats)
    assert (result["completed"], result["total_output_tokens"]) == (6, 72)
    cached = result["total_cached_tokens"]
    assert isinstance(cached, int) and cached >= 2 * (40 + 80) - 6 * 16  # whole blocks of 16


async def test_a_disconnected_client_leaves_no_work_behind(cluster: Cluster, tmp_path: Path) -> None:
    """Guards the next benchmark against work left by one with cancels."""
    result = await result_of(cluster, tmp_path, cancel_rate=1.0, random_output_len=200)
    assert result["failed"] == 0 and result["cancelled"] != 0  # how many complete depends on the machine's speed
    cluster.wait_idle()
