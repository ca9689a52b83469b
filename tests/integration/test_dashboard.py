"""The dashboard in a real browser, on a real cluster under load, with an API key: it shows the values of /metrics."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from baton.tests.integration import browser
from baton.tests.integration.browser import Browser, DidNotStart
from baton.tests.integration.cluster import Cluster

pytestmark = pytest.mark.skipif(not browser.find(), reason="there is no Chromium to open the dashboard in")

KEY = "a-key-for-this-test"
PROMPT = "Once upon a time there was a little dog who lived in a red house with his friend, the old cat. One day"
TILES = """Object.fromEntries([...document.querySelectorAll('#tiles div')]
    .map((tile) => [tile.children[1].textContent, tile.children[0].textContent]))"""
ROWS = """[...document.querySelectorAll('#workers tbody tr')]
    .map((row) => [...row.cells].slice(0, 3).map((cell) => cell.textContent)).sort()"""
GIVE_KEY = f"""document.querySelector('#key input').value = {json.dumps(KEY)};
    document.querySelector('#key button').click()"""
PANELS = ("hit-rate", "sources", "occupancy", "transfers", "ttft", "tbt", "e2e", "ttft-by-source", "stages")
DRAWN = """(() => {{ const canvas = document.querySelector('#{panel} canvas');
    const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    return data.some((value) => value > 0) && document.querySelector('#{panel} .legend').children.length; }})()"""


@pytest.fixture
async def page(tmp_path: Path) -> AsyncIterator[Browser]:
    opened = Browser(tmp_path / "profile")
    try:
        await opened.__aenter__()
    except DidNotStart as error:
        pytest.skip(f"Chromium does not start here: {error}")
    yield opened
    await opened.__aexit__(None, None, None)


async def test_live_under_load(page: Browser, tmp_path: Path) -> None:
    """Guards the whole path: served, authorised, polled, computed and drawn while requests run."""
    with Cluster(api_key=KEY, log_folder=tmp_path) as cluster:
        await page.open(f"{cluster.url}/dashboard")
        await page.until("!document.getElementById('key').hidden")
        assert "401" in await page.evaluate("document.getElementById('status').textContent")
        await page.evaluate(GIVE_KEY)
        await page.until("document.getElementById('status').className === 'good'")
        assert await page.evaluate("document.getElementById('key').hidden")
        for _ in range(3):
            await asyncio.to_thread(cluster.complete, PROMPT, max_tokens=20, ignore_eos=True)
        await page.until(f"!({TILES})['TTFT p50 / p99'].startsWith('–')")
        await page.until(f"parseFloat(({TILES})['KV hit rate']) > 0")  # the prompt was sent three times
        assert (await page.evaluate(TILES))["workers ready"] == "2"
        assert await page.evaluate(ROWS) == [["decode-0", "decode", "ready"], ["prefill-0", "prefill", "ready"]]
        for panel in PANELS:
            await page.until(DRAWN.format(panel=panel))
        await page.screenshot(tmp_path / "dashboard.png")
        assert (tmp_path / "dashboard.png").stat().st_size > 20_000
        cluster.nodes.kill("proxy")
        await page.until("document.getElementById('status').className === 'bad'")
