"""What a trial says of chat templates, and what it costs where they are hostile."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.node.errors import BadRequest
from baton.proxy.formats.markup import Thinking
from baton.proxy.text.model_text import ModelText
from baton.proxy.text.renderer import Renderer
from baton.proxy.text.template import RenderOptions

QUESTION = [{"role": "user", "content": "x"}]
TURNS = "{% for message in messages %}{{ message.content }}{% endfor %}"
LOOP = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}"
)


@pytest.fixture
def made() -> Iterator[list[Renderer]]:
    renderers: list[Renderer] = []
    yield renderers
    for renderer in renderers:
        renderer.close()


@pytest.mark.parametrize(
    ("template", "ignores"),
    [
        (TURNS, True),
        ("{{ tools }}" + TURNS, False),
        ("{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}" + TURNS, False),
        ("{% if tools %}{{ raise_exception('none') }}{% endif %}" + TURNS, False),
        ("{% if messages | length < 2 %}{{ raise_exception('too short') }}{% endif %}", False),
    ],
)
def test_tools_are_shown_or_not(made: list[Renderer], template: str, ignores: bool) -> None:
    """Guards against tools that are refused without need: a template that fails says nothing."""
    made.append(Renderer(template, {}))
    try:
        made[0].render(QUESTION)
    except BadRequest:
        assert not ignores
    assert made[0].trial is not None and made[0].trial.ignores_tools is ignores


def test_a_template_of_parts_gets_texts_as_parts(made: list[Renderer]) -> None:
    """Guards against a prompt without the client's words: templates of models that see images loop over parts."""
    parts = "{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part.text }}{% endfor %}"
    made.append(Renderer("{% for m in messages %}" + parts + "{% if not loop.last %}|{% endif %}{% endfor %}!", {}))
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I am"}]
    assert made[0].render(turns) == "Hi|I am!"
    assert made[0].render(turns, RenderOptions(continue_final_message=True)) == "Hi|I am"
    either = "{{ m.content if m.content is string else 'parts' }}"
    made.append(Renderer("{% for m in messages %}" + either + "{% endfor %}", {}))
    assert made[1].render(turns[:1]) == "Hi"


def test_a_trial_that_does_not_end_is_cut(made: list[Renderer]) -> None:
    """Guards the chats of a model whose template loops for tools."""
    made.append(Renderer("{% if tools %}" + LOOP + "{% endif %}" + TURNS, {}))
    assert made[0].render(QUESTION) == "x"
    assert made[0].trial is not None and not made[0].trial.ignores_tools


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        ("", Thinking.UNKNOWN),
        ("{{ '<think>' if enable_thinking }}", Thinking.CLOSED),
        ("{{ '<think>' if thinking else '</think>' }}", Thinking.CLOSED),
        ("{{ '<think></think>' if enable_thinking is defined and not enable_thinking }}", Thinking.UNKNOWN),
        ("<think>", Thinking.OPEN),
    ],
)
def test_a_model_whose_prompts_begin_reasoning_does_not_begin_it(
    demo_folder: Path, tmp_path: Path, ending: str, expected: Thinking
) -> None:
    """Guards plain answers of a given form, whose first token would else be the marker of reasoning."""
    folder = tmp_path / "demo"
    shutil.copytree(demo_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    content = json.loads((folder / "tokenizer_config.json").read_text())
    content["chat_template"] = TURNS + "<|assistant|>" + ending
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    text = ModelText(folder)
    prompt = text.render(QUESTION)
    assert text.thinking(text.encode(prompt, add_special_tokens=False)) is expected
    text.close()
