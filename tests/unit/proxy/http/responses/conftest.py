"""A model whose template shows its input as JSON, and an engine that answers what a test sets."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from baton.node.messages.control import Logprob
from baton.proxy.http.app import create_app
from baton.proxy.interface import AppSettings, Delta
from baton.proxy.text.model_text import ModelText
from baton.testing.fake_engine import EngineCall, FakeEngine, ScriptStep

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}{# <tool_call> #}{{ messages | tojson }}\n"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def text(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelText]:
    folder = tmp_path_factory.mktemp("model") / "demo"
    shutil.copytree(demo_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    made = ModelText(folder)
    yield made
    made.close()


class Answers:
    """Sets what the engine answers, a few tokens a delta."""

    def __init__(self, text: ModelText) -> None:
        self.text = ""
        self.finish = "stop"
        self.num_together = 2
        self.error: Exception | None = None
        """In place of the last delta."""
        self.prompts: list[str] = []
        self.grammars: list[str] = []
        """Of the requests, empty where the answer is free."""
        self._model_text = text

    def script(self, call: EngineCall) -> list[ScriptStep]:
        self.prompts.append(self._model_text.decode(call.prompt_ids, skip_special_tokens=False))
        grammar = call.sampling.grammar
        self.grammars.append(grammar.text if grammar is not None else "")
        ids = self._model_text.encode(self.text, add_special_tokens=False)
        if self.finish == "stop":
            ids += (self._model_text.eos_ids[-1],)
        likely = ((ids[0], -0.25),) * call.sampling.top_logprobs
        logprobs = (Logprob(-0.5, likely),) if call.sampling.logprobs else ()
        parts = [ids[place : place + self.num_together] for place in range(0, len(ids), self.num_together)]
        steps: list[ScriptStep] = [Delta(part, logprobs * len(part), "", 3) for part in parts[:-1]]
        return [*steps, self.error or Delta(parts[-1], logprobs * len(parts[-1]), self.finish, 3)]


@pytest.fixture
def answers(text: ModelText) -> Answers:
    return Answers(text)


@pytest.fixture
async def client(answers: Answers, text: ModelText) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(FakeEngine(answers.script), {"demo": text}, AppSettings())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as made:
        yield made
