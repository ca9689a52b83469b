"""A headless Chromium for tests of pages, driven over its DevTools protocol; `find()` locates one.

Source: the Chrome DevTools Protocol, domains Page and Runtime.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import re
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

START_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 60.0
# The flags against background work and sync stop look-ups of hosts that an isolated network does not have.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)


class DidNotStart(Exception):
    """A browser is installed but cannot run on this machine."""


def find() -> str:
    """The path of a Chromium or Chrome; empty if none is installed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for path in map(shutil.which, names) if path), "")


class Browser:
    """async with Browser(profile_folder) as page: await page.open(url); await page.until("...")"""

    def __init__(self, profile: Path, width: int = 1500, height: int = 1400) -> None:
        self._profile = profile
        self._size = (width, height)
        self._ids = itertools.count(1)

    async def __aenter__(self) -> Self:
        self._profile.mkdir(parents=True, exist_ok=True)
        log = self._profile / "log"
        size = "--window-size={},{}".format(*self._size)
        with log.open("wb") as out:
            command = [find(), *FLAGS, size, f"--user-data-dir={self._profile}", "about:blank"]
            self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=out)
        try:
            port = await self._port(log)
            self._http = aiohttp.ClientSession()
            async with self._http.get(f"http://127.0.0.1:{port}/json/list") as answer:
                pages = [page for page in await answer.json() if page["type"] == "page"]
            self._socket = await self._http.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)
        except BaseException:
            self._process.kill()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._socket.close()
        await self._http.close()
        self._process.kill()
        self._process.wait(CALL_TIMEOUT_S)

    async def open(self, url: str) -> None:
        """Navigate to `url`, and wait until the page and its scripts are loaded."""
        await self._call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def evaluate(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression; an exception there fails."""
        answer = await self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, expression: str, timeout_s: float = 60.0) -> Any:
        """Poll until a JavaScript expression is truthy; its value."""
        deadline = time.monotonic() + timeout_s
        while not (value := await self.evaluate(expression)):
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {expression}"
            await asyncio.sleep(0.1)
        return value

    async def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        answer = await self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    async def _call(self, method: str, **params: object) -> dict[str, Any]:
        number = next(self._ids)
        async with asyncio.timeout(CALL_TIMEOUT_S):
            await self._socket.send_json({"id": number, "method": method, "params": params})
            while True:
                answer = await self._socket.receive_json()
                if answer.get("id") == number:
                    assert "error" not in answer, answer["error"]
                    return dict(answer["result"])

    async def _port(self, log: Path) -> int:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (match := re.search(r"DevTools listening on ws://127\.0\.0\.1:(\d+)/", log.read_text())):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise DidNotStart(log.read_text()[-2000:])
            await asyncio.sleep(0.1)
        return int(match[1])
