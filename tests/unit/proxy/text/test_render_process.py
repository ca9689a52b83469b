"""Chat templates that loop, grow or recurse: the client's error, and the next conversation is rendered all the same."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.node.errors import BadRequest, Overloaded, SettingsError
from baton.proxy.text.model_text import ModelText
from baton.proxy.text.render_process import RenderProcess
from baton.proxy.text.template import MAX_TEMPLATE_CHARS, RenderOptions

LOOP = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}"
)
DOUBLING = "{% set ns = namespace(s='ab' * 1000) %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
PLAIN = [{"role": "user", "content": "plain"}]
OPTIONS = RenderOptions()


def unless_plain(hostile: str) -> str:
    return "{% if messages[0].content == 'plain' %}plain{% else %}" + hostile + "{% endif %}"


@pytest.fixture
def made() -> Iterator[list[RenderProcess]]:
    processes: list[RenderProcess] = []
    yield processes
    for process in processes:
        process.close()


@pytest.mark.parametrize(
    ("hostile", "reason"),
    [
        (LOOP, "did not end within"),
        (DOUBLING, "too much memory"),
        ("{{ messages[0].content * 3000000000 }}", "too much memory"),
        ("{{ '%1000000000d' | format(messages | length) }}", "too much memory"),
        ("{% set base = 9 + messages | length %}{{ base ** (base ** 9) }}", "did not end within|too much memory"),
        ("{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}", "recurses too deeply"),
    ],
)
def test_a_template_that_exceeds_its_limits_is_the_clients_error(
    made: list[RenderProcess], hostile: str, reason: str
) -> None:
    """Guards against a thread that renders for ever, or a proxy out of memory; and against the end of all chats."""
    # The limit of time is far away where memory ends it: on some machines 512 MB take longer than half a second.
    cpu_limit_s = 0.5 if "did not end" in reason else 60.0
    made.append(RenderProcess(unless_plain(hostile), {}, cpu_limit_s))
    with pytest.raises(BadRequest, match=f"chat template.*({reason})") as raised:
        made[0].render([{"role": "user", "content": "hostile"}], OPTIONS)
    assert raised.value.param == "messages"
    assert made[0].render(PLAIN, OPTIONS) == "plain"


@pytest.mark.parametrize("source", ["{{ 'a' * 3000000000 }}", "{% for a in [1] %}" * 30 + "{% endfor %}" * 30])
def test_a_template_that_cannot_be_compiled_is_named_as_the_cause(made: list[RenderProcess], source: str) -> None:
    """Guards against constants of a template that are computed in the proxy, and against a traceback."""
    made.append(RenderProcess(source, {}, cpu_limit_s=0.5))
    for _ in range(2):
        with pytest.raises(BadRequest, match="chat template"):
            made[0].render(PLAIN, OPTIONS)


@pytest.mark.parametrize(
    "source", ["{% for %}", "{% if 1 %}" * 3000, "{{ " + "(" * 5000, "x" * (MAX_TEMPLATE_CHARS + 1)]
)
def test_a_folder_whose_template_cannot_be_parsed_is_refused(source: str) -> None:
    """Guards against a traceback, or minutes of parsing, at the start."""
    with pytest.raises(SettingsError, match="chat template"):
        RenderProcess(source, {})


def test_any_json_reaches_the_template_as_it_is(made: list[RenderProcess]) -> None:
    """Guards against values that the format between processes changes: large numbers, half of a surrogate pair."""
    made.append(RenderProcess("{{ messages[0] | tojson }}{{ bos_token }}", {"bos_token": "<s>"}))
    message = {"role": "assistant", "content": "\ud800é", "tool_calls": [{"id": 2**80, "x": [None, 0.5, {"y": True}]}]}
    assert made[0].render([message], OPTIONS) == json.dumps(message, ensure_ascii=False) + "<s>"


async def test_others_are_served_while_a_template_loops(tmp_path: Path, demo_folder: Path) -> None:
    """Guards against a stuck template that stops the event loop, or takes the threads that tokenise."""
    folder = shutil.copytree(demo_folder, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(unless_plain(LOOP))
    text = ModelText(folder)
    stuck = asyncio.create_task(text.render_bounded([{"role": "user", "content": "hostile"}], OPTIONS))
    ids = await text.encode_bounded("word " * 1000, add_special_tokens=False, max_tokens=1 << 20, param="prompt")
    assert ids and not stuck.done()
    text.close()
    with pytest.raises(
        (BadRequest, Overloaded), match="chat template"
    ):  # by processor time; of a busy machine, by wait
        await stuck
