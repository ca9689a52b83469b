"""The dashboard: served whole without a key, and its arithmetic, run in Node where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from baton.proxy.http.app import create_app
from baton.proxy.interface import AppSettings
from baton.proxy.text.model_text import ModelText
from baton.testing.fake_engine import FakeEngine

FOLDER = Path(__file__).parents[4] / "proxy" / "metrics" / "dashboard"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.js"))


async def test_page_is_whole_and_open(engine: FakeEngine, text: ModelText, app_settings: AppSettings) -> None:
    """Guards the page against a file that is not served, and the metrics against a page that opens them."""
    app = create_app(engine, {"demo": text}, replace(app_settings, api_keys=("secret",)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as client:
        page = await client.get("/dashboard")
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        linked = re.findall(r'(?:src|href)="(dashboard/[^"]+)"', page.text)
        for name in SCRIPTS:
            linked += [f"dashboard/{other}" for other in re.findall(r'from "\./([^"]+)"', (FOLDER / name).read_text())]
        assert {f"dashboard/{name}" for name in (*SCRIPTS, "style.css")} == set(linked)
        for path in linked:
            assert (await client.get(f"/{path}")).status_code == 200, path
        assert (await client.get("/metrics")).status_code == 401


async def test_page_asks_no_other_host(client: httpx.AsyncClient) -> None:
    """Guards a machine without a network, and its users' privacy."""
    page = await client.get("/dashboard")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for path in FOLDER.iterdir():
        if path.suffix in {".html", ".css", ".js"}:
            assert not re.search(r"""://|["'(]//|@import""", path.read_text()), path.name


async def test_page_runs_its_own_scripts_only(client: httpx.AsyncClient) -> None:
    """Guards the key that is typed into the page: from scripts in names of workers, which others choose, and from pages
    that show this one in a frame."""
    page = await client.get("/dashboard")
    policy = page.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in policy and "unsafe-" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script(?![^>]*\ssrc=)|\son\w+=|<iframe|<style|\sstyle=|javascript:", page.text)
    for name in SCRIPTS:
        forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|localStorage"
        assert not re.search(forbidden, (FOLDER / name).read_text()), name


async def test_without_metrics_there_is_no_page(engine: FakeEngine, text: ModelText, app_settings: AppSettings) -> None:
    """Guards against a page that can show nothing."""
    app = create_app(engine, {"demo": text}, replace(app_settings, metrics=False))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as client:
        assert (await client.get("/dashboard")).status_code == 404


# ---- the arithmetic


@pytest.fixture
def in_node(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Evaluates a JavaScript expression over exposition.js, charts.js and given texts; returns its JSON value."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no Node to run the page's scripts in")
    for name in SCRIPTS:
        shutil.copy(FOLDER / name, tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')

    def run(expression: str, *texts: str) -> Any:
        (tmp_path / "main.js").write_text(
            'import * as exposition from "./exposition.js";\n'
            'import * as charts from "./charts.js";\n'
            'import * as panels from "./panels.js";\n'
            "const { Scrape, growth, rate, quantiles, mean } = exposition;\n"
            f"const texts = {json.dumps(texts)};\n"
            "const [before, now] = texts.map((text, index) => new Scrape(text, index * 10));\n"
            f"console.log(JSON.stringify({expression}));\n"
        )
        ended = subprocess.run([node, tmp_path / "main.js"], capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    return run


async def test_reads_what_prometheus_reads(in_node, client: httpx.AsyncClient) -> None:  # type: ignore[no-untyped-def]
    """Guards the parser, labels with quotes, commas and backslashes among them, against prometheus-client's."""
    text = (await client.get("/metrics")).text + 'odd{a="x\\"y, \\\\z",b="{1}"} 2.5e-3\nodd{a="",b="\\n"} +Inf\n'
    expected: dict[str, list[Any]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            value = None if sample.value == float("inf") else sample.value  # JSON has no infinity
            expected.setdefault(sample.name, []).append({"labels": sample.labels, "value": value})
    assert in_node("Object.fromEntries(before.samples)", text.replace("+Inf\n", "Infinity\n")) == expected


def observed(*values: float) -> str:
    registry = CollectorRegistry()
    histogram = Histogram("h", "x", ["kind"], buckets=(0.1, 0.2, 0.4), registry=registry)
    for value in values:
        histogram.labels("a").observe(value)
    histogram.labels("b").observe(9.0)
    return generate_latest(registry).decode()


def test_quantiles_of_what_came_in_between(in_node) -> None:  # type: ignore[no-untyped-def]
    """Guards against quantiles since the start, and against other labels' observations."""
    before, now = observed(0.05, 0.05), observed(0.05, 0.05, 0.15, 0.15, 0.3, 0.3)
    found = in_node('quantiles(before, now, "h", [0.25, 0.5, 0.75, 1], {kind: "a"})', before, now)
    assert found == pytest.approx([0.15, 0.2, 0.3, 0.4])
    assert in_node('quantiles(before, now, "h", [0.5], {kind: "b"})', before, now) == [None]
    assert in_node('mean(before, now, "h", {kind: "a"})', before, now) == pytest.approx(0.225)
    beyond = observed(7.0, 8.0)
    assert in_node('quantiles(before, now, "h", [0.5], {kind: "a"})', observed(), beyond) == [0.4]


def test_counters_that_begin_anew(in_node) -> None:  # type: ignore[no-untyped-def]
    """Guards rates across the restart of a worker, and of one that was not there before."""
    before, now = 'c{w="a"} 100\nc{w="b"} 7\n', 'c{w="a"} 5\nc{w="b"} 9\nc{w="new"} 3\n'
    assert in_node('growth(before, now, "c")', before, now) == 5 + 2 + 3
    assert in_node('rate(before, now, "c", {w: "b"})', before, now) == pytest.approx(0.2)
    assert in_node('rate(now, now, "c")', before, now) == 0


def test_hit_rate_of_the_last_half_minute(in_node) -> None:  # type: ignore[no-untyped-def]
    """Guards the number that people look at: tokens by source, not requests, and not since the start."""
    name = "baton:prompt_tokens_total"
    before = f'{name}{{source="gpu"}} 1000\n{name}{{source="computed"}} 0\n'
    now = f'{name}{{source="gpu"}} 1030\n{name}{{source="computed"}} 70\n'
    view = "{now, before: () => before}"
    hit_rate = f'panels.PANELS.find(({{id}}) => id === "hit-rate").of({view})'
    assert in_node(hit_rate, before, now) == {"gpu": pytest.approx(0.3)}
    assert ["KV hit rate", "30 %"] in in_node(f"panels.tiles({view})", before, now)


def test_numbers_for_people(in_node) -> None:  # type: ignore[no-untyped-def]
    """Guards units: a thousandfold mistake on an axis is believed."""
    assert in_node("[0, 0.0004, 0.25, 3].map(charts.seconds)") == ["0 ms", "400 µs", "250 ms", "3 s"]
    assert in_node("[950, 1234567, 2.5e9].map(charts.plain)") == ["950", "1.23M", "2.5G"]
    assert in_node("charts.ticks(1)") == pytest.approx([0, 0.5, 1.0])
    assert in_node("charts.ticks(730)") == pytest.approx([0, 200, 400, 600])
