"""The demo model's text side, an engine that replays scripts, and the app over both, in process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import pytest

from baton.node.messages.control import Logprob
from baton.proxy.http.app import create_app
from baton.proxy.interface import AppSettings, Delta
from baton.proxy.text.model_text import ModelText
from baton.testing.fake_engine import EngineCall, FakeEngine, ScriptStep

DEMO = Path(__file__).parents[3] / "models" / "demo"

Says = Callable[..., Callable[[EngineCall], list[ScriptStep]]]


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    return DEMO


@pytest.fixture(scope="session")
def text() -> Iterator[ModelText]:
    made = ModelText(DEMO)
    yield made
    made.close()


@pytest.fixture(scope="session")
def says(text: ModelText) -> Says:
    """Makes scripts: one delta a token of an answer, with probabilities where asked for, then the end token."""

    def make(answer: str, finish: str = "stop", cached_tokens: int = 0) -> Callable[[EngineCall], list[ScriptStep]]:
        ids = list(text.encode(answer, add_special_tokens=False))
        ids += [text.eos_ids[-1]] if finish == "stop" else []

        def script(call: EngineCall) -> list[ScriptStep]:
            logprobs = (
                (Logprob(-0.5, ((ids[0], -0.25),) * call.sampling.top_logprobs),) if call.sampling.logprobs else ()
            )
            steps: list[ScriptStep] = [Delta((token,), logprobs, "", cached_tokens) for token in ids[:-1]]
            return [*steps, Delta((ids[-1],), logprobs, finish, cached_tokens)]

        return script

    return make


@pytest.fixture
def engine(says: Says) -> FakeEngine:
    return FakeEngine(says("Once upon a time."))


@pytest.fixture
def app_settings() -> AppSettings:
    return AppSettings()


@pytest.fixture
async def client(engine: FakeEngine, text: ModelText, app_settings: AppSettings) -> AsyncIterator[httpx.AsyncClient]:
    """Requests to the app without a socket; override `app_settings` for another app."""
    transport = httpx.ASGITransport(create_app(engine, {"demo": text}, app_settings), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as made:
        yield made
