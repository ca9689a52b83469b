"""A whole load test in one process, against the null server: what it prints, writes, and says by its exit status."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from baton.benchmark.load import null_server, self_test
from baton.benchmark.load.experiment import Server, in_turns
from baton.benchmark.load.serving import command_line, serving
from baton.benchmark.load.settings import ServingSettings
from baton.node.errors import SettingsError
from baton.node.http_client import Origin

MAX_HTML_BYTES = 500_000


@pytest_asyncio.fixture
async def url() -> AsyncIterator[str]:
    """A null server in this event loop."""
    server = await null_server.start(null_server.NullServerSettings())
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


def settings(url: str, **more: object) -> ServingSettings:
    small = {"base_url": url, "num_prompts": 6, "num_warmups": 1, "random_input_len": 9, "random_output_len": 5}
    return ServingSettings(**{**small, **more})  # type: ignore[arg-type]  # of many types, checked by the test


async def test_one_run_from_its_settings_to_its_files(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Counts that are off by a warm-up, keys that vLLM's users do not find, text of prompts in a file."""
    wanted = settings(
        url, goodput=("ttft:60000", "tpot:60000"), save_result=True, save_detailed=True, save_requests=True,
        result_dir=tmp_path, request_rate=("1000",), metric_percentiles="99,99.9",
    )  # fmt: skip
    assert await serving(wanted, ["--request-rate", "1000"]) == 0
    printed = capsys.readouterr().out
    assert "6 completed, 0 failed, 0 cancelled" in printed and "30, counted by the server" in printed
    result = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert (result["completed"], result["failed"], result["num_prompts"]) == (6, 0, 6)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (54, 30)
    assert result["model_id"] == "null" and result["request_rate"] == 1000 and result["slo_attainment"] == 1.0
    assert result["request_goodput"] == result["request_throughput"] > 0
    for metric in ("ttft", "tpot", "itl", "e2el"):
        assert {f"{name}_{metric}_ms" for name in ("mean", "median", "std", "p50", "p99", "p99.9")} <= set(result)
    assert set(VLLM_KEYS) <= set(result)
    assert [len(itls) for itls in result["itls"]] == [4] * 6 and result["command"].endswith("--request-rate 1000")
    lines = [json.loads(line) for line in next(tmp_path.glob("*.jsonl")).read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(6)) and {line["status"] for line in lines} == {"completed"}
    assert all(line["ttft_ms"] <= line["e2el_ms"] and line["request_rate"] == "1000" for line in lines)
    assert not {"text", "prompt"} & set(lines[0])


_KEYS = """
date endpoint_type label model_id tokenizer_id num_prompts request_rate burstiness max_concurrency duration completed
failed total_input_tokens total_output_tokens request_throughput request_goodput output_throughput
total_token_throughput max_output_tokens_per_s max_concurrent_requests input_lens output_lens ttfts itls start_times
errors
"""
VLLM_KEYS = _KEYS.split()


async def test_a_ladder_and_its_report(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report must open without a network, be small, and hold every plot as well-formed SVG."""
    html = tmp_path / "deep" / "report.html"
    wanted = settings(
        url, request_rate=("500", "2000"), seed=(0, 1), goodput=("ttft:60000",), html=html, cancel_rate=0.5
    )
    assert await serving(wanted, ["--api-key", "secret"]) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"^\| (?:500|2000) +\| [01] ", printed, re.MULTILINE)) == 4
    page = html.read_text()
    assert len(page.encode()) < MAX_HTML_BYTES and "secret" not in page
    svgs = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    titles = [" ".join(ElementTree.fromstring(svg).itertext()) for svg in svgs]
    for title in (
        "TTFT",
        "Time between tokens",
        "TTFT by rate",
        "TPOT by rate",
        "Goodput",
        "Timeline: 500",
        "Timeline: 2000",
    ):
        assert any(title in found for found in titles), title
    links = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"'\s)>]+)", page)
    assert links and all(link.startswith("#") for link in links)


async def test_two_servers_side_by_side(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = settings(url, compare=(f"one={url}", f"two={url}/v1"), seed=(0, 1), find_rate=False)
    assert await serving(wanted, []) == 0
    printed = capsys.readouterr().out
    assert "two / one" in printed and re.search(r"\| inf +\| output tokens/s +\| [\d.e+]+ +\| [\d.e+]+ +\| ", printed)
    order = re.findall(r"^(one|two) inf req/s, seed (\d)", printed, re.MULTILINE)
    assert order == [("one", "0"), ("two", "0"), ("two", "1"), ("one", "1")]


async def test_a_server_beside_itself_has_two_names(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """How far two equal servers differ is what a difference has to be held against."""
    assert await serving(settings(url, compare=(url, url)), []) == 0
    assert re.search(r":\d+#2 / .*:\d+#1", capsys.readouterr().out)


async def test_a_search_says_what_it_found(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit that no server can keep: the search ends, and says so."""
    wanted = settings(url, find_rate=True, goodput=("ttft:0",), request_rate=("100000",), num_prompts=2)
    assert await serving(wanted, []) == 0
    assert "no rate at which 90 % of requests keep ttft ≤ 0 ms" in capsys.readouterr().out


async def test_conversations_and_chats(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Text prompts with a tokenizer, turns with their answers, all through one client."""
    wanted = settings(url, turns=3, num_prompts=2, tokenizer="demo", random_prefix_len=4, max_concurrency=1)
    assert await serving(wanted, []) == 0
    printed = capsys.readouterr().out
    assert "6 completed" in printed and "a closed loop" in printed


async def test_a_run_in_which_all_fails_is_a_failure(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 0 would let a script publish a table of zeros."""
    wanted = settings(url, extra_body='{"max_tokens": "many"}')
    assert await serving(wanted, []) == 1
    said = capsys.readouterr()
    assert "6 requests failed: HTTP 400" in said.err and "warm-ups failed" in said.err and "6 failed" in said.out


async def test_a_run_that_the_client_gave_up_is_no_failure(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It was asked to go away in the middle of every answer, and did."""
    assert await serving(settings(url, cancel_rate=1.0), []) == 0
    assert "0 completed, 0 failed, 6 cancelled" in capsys.readouterr().out


async def test_a_run_leaves_frozen_what_others_froze(url: str) -> None:
    """Guards a process that keeps its objects out of collections, as that of these tests, against taking them back."""
    before = gc.get_freeze_count()
    assert await serving(settings(url), []) == 0
    assert gc.get_freeze_count() >= before > 0


async def test_no_server_is_told_before_anything_is_sent() -> None:
    with pytest.raises(SettingsError, match=r"no server: cannot connect to http://127\.0\.0\.1:1"):
        await serving(settings("http://127.0.0.1:1"), [])


async def test_the_self_test_counts_every_token(url: str) -> None:
    """A client that loses tokens is fast; the speed itself is printed, not asserted."""
    speed = await self_test.measure(Origin.parse(url), num_streams=4, tokens_a_stream=50)
    assert speed.tokens == 200 and 1 <= speed.reads <= 200 and "tokens a CPU second" in str(speed)


def test_keys_are_no_part_of_a_report() -> None:
    assert command_line(["--api-key", "k1", "--api-key=k2", "a b"]) == (
        "baton bench serving --api-key ... --api-key=... 'a b'"
    )


def test_servers_take_turns_and_change_who_is_first() -> None:
    """What a machine does meanwhile must not meet one server only."""
    one, two = (Server(name, Origin("h", 1, False, ""), "m") for name in ("one", "two"))
    order = [(server.name, rate, seed) for server, rate, seed in in_turns([one, two], [1.0, 2.0], [0, 1])]
    assert order[:4] == [("one", 1.0, 0), ("two", 1.0, 0), ("two", 2.0, 0), ("one", 2.0, 0)]
    assert [seed for _, _, seed in order] == [0] * 4 + [1] * 4


async def test_two_servers_are_asked_the_same_and_one_never_twice() -> None:
    """Other prompts are another load; the same ones again are found in the cache of the first run."""
    bodies: list[bytes] = []

    class Noting(null_server.Connection):
        models = b'{"data": [{"id": "a"}, {"id": "b"}]}'

        def begin(self, body: bytes) -> None:
            bodies.append(body)
            super().begin(body)

    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(lambda: Noting(0.0), "127.0.0.1", 0) for _ in range(2)]
    urls = [f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in servers]
    alone = {"num_prompts": 1, "num_warmups": 0, "model": ("a", "b")}
    assert await serving(settings(urls[0], compare=(urls[0], urls[1]), seed=(0, 1), **alone), []) == 0
    assert await serving(settings(urls[0], compare=(urls[0], urls[0]), **alone), []) == 0
    for server in servers:
        server.close()
    asked = [json.loads(body) for body in bodies]
    assert [request["model"] for request in asked] == ["a", "b", "b", "a", "a", "b"]
    prompts = [tuple(request["prompt"]) for request in asked]
    assert prompts[0] == prompts[1] and prompts[2] == prompts[3] and len(set(prompts)) == 4
