"""A model whose template has tools and reasoning, and the app over an engine whose answers tests choose."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from baton.proxy.http.app import create_app
from baton.proxy.interface import AppSettings, Delta
from baton.proxy.text.model_text import ModelText
from baton.testing.fake_engine import EngineCall, FakeEngine, ScriptStep

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}{# <tool_call> #}"
    "{% for message in messages %}<|{{ message.role }}|>\n"
    "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ message.content }}{% for call in message.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    "{% if enable_thinking is defined %}{{ '<think>\n' if enable_thinking else '<think>\n\n</think>\n\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def markup_text(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelText]:
    folder = tmp_path_factory.mktemp("markup") / "demo"
    shutil.copytree(demo_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    made = ModelText(folder)
    yield made
    made.close()


class Scripted:
    """What the engine answers: text in deltas of `tokens_a_delta` tokens, then `finish`, or `error` in the middle."""

    def __init__(self, text: ModelText) -> None:
        self.text = "Once upon a time."
        self.finish = "stop"
        self.tokens_a_delta = 2
        self.cached_tokens = 0
        self.error: Exception | None = None
        self._model_text = text

    def script(self, call: EngineCall) -> list[ScriptStep]:
        if call.sampling.max_tokens == 0:
            return [Delta((), finish="length")]
        ids = self._model_text.encode(self.text, add_special_tokens=False)
        if self.finish == "stop":
            ids += (self._model_text.eos_ids[-1],)
        parts = [ids[place : place + self.tokens_a_delta] for place in range(0, len(ids), self.tokens_a_delta)]
        made: list[ScriptStep] = [Delta(part, cached_tokens=self.cached_tokens) for part in parts[:-1]]
        if self.error is not None:
            return [*made[:1], self.error] if self.text else [self.error]
        return [*made, Delta(parts[-1], finish=self.finish, cached_tokens=self.cached_tokens)]


@pytest.fixture
def scripted(markup_text: ModelText) -> Scripted:
    return Scripted(markup_text)


@pytest.fixture
def engine(scripted: Scripted) -> FakeEngine:
    return FakeEngine(scripted.script)


@pytest.fixture
async def client(
    engine: FakeEngine, markup_text: ModelText, app_settings: AppSettings
) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(engine, {"demo": markup_text}, app_settings)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as made:
        yield made
