"""The load generator against a real cluster: it counts what the server counted, and leaves nothing behind."""

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
    """The JSON of a small run, which must end well."""
    settings = ServingSettings(base_url=cluster.url, save_detailed=True, result_dir=folder, **{**SMALL, **more})  # type: ignore[arg-type]
    assert await serving(settings, []) == 0
    return dict(json.loads(next(folder.glob("*.json")).read_text()))


def counted(cluster: Cluster, name: str) -> float:
    """A counter of the proxy's metrics page."""
    found = [line for line in cluster.metrics() if line.startswith(f"vllm:{name}_total{{")]
    return sum(float(line.rpartition(" ")[2]) for line in found)


async def test_its_token_sums_are_the_servers(cluster: Cluster, tmp_path: Path) -> None:
    """A client that loses or doubles tokens reports a throughput that no server has."""
    before = {name: counted(cluster, name) for name in ("prompt_tokens", "generation_tokens")}
    result = await result_of(cluster, tmp_path, request_rate=("20",), max_concurrency=4)
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (8, 0, 96)
    assert result["total_input_tokens"] == 8 * 40 and result["tokens_counted_by"] == "server"
    assert result["output_lens"] == [12] * 8 and result["model_id"] == "demo"
    assert counted(cluster, "prompt_tokens") - before["prompt_tokens"] == 320
    assert counted(cluster, "generation_tokens") - before["generation_tokens"] == 96


async def test_conversations_find_what_was_said(cluster: Cluster, tmp_path: Path) -> None:
    """Turns whose prompts do not begin as the last ones did would measure a cache that never hits."""
    chats = {"backend": "openai-chat", "turns": 3, "num_prompts": 2, "tokenizer": "demo"}
    result = await result_of(cluster, tmp_path, **chats)
    assert (result["completed"], result["total_output_tokens"]) == (6, 72)
    cached = result["total_cached_tokens"]
    assert isinstance(cached, int) and cached >= 2 * (40 + 80) - 6 * 16  # whole blocks of 16


async def test_a_client_that_goes_away_leaves_nothing_behind(cluster: Cluster, tmp_path: Path) -> None:
    """A benchmark with cancels must not leave the server busy for the next one."""
    result = await result_of(cluster, tmp_path, cancel_rate=1.0, random_output_len=200)
    assert result["failed"] == 0 and result["cancelled"] != 0  # which are too late is the speed of this machine
    cluster.wait_idle()
