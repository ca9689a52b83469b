"""How a client wants its conversation rendered: the parameters that chats and `/tokenize` share.

Knows no messages and no template. Source: vLLM's extra parameters, which are those of transformers' chat templates.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from baton.node.errors import BadRequest
from baton.proxy.text.effort import LEVEL, SWITCHES
from baton.proxy.text.template import RenderOptions

MAX_VARIABLES = 64
MAX_VARIABLE_CHARS = 1 << 16
RESERVED = frozenset(
    (
        *("messages", "conversation", "tools", "documents", "chat_template", "tokenize", "return_dict"),
        *("add_generation_prompt", "continue_final_message", "raise_exception", "strftime_now"),
    )
)
"""Names that a template has from elsewhere."""
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ThinkingSwitch(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    type: Literal["enabled", "adaptive", "disabled", "auto"]


class TemplateRequest(BaseModel):
    """The fields; null means "not given"."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, frozen=True)

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=MAX_VARIABLES)] | None = None
    enable_thinking: bool | None = None
    """Alibaba's name; sets the switches of reasoning that `chat_template_kwargs` does not set."""
    thinking: ThinkingSwitch | None = None
    """DeepSeek's and Zhipu's name of the same."""


def render_options(
    request: TemplateRequest, tools: Sequence[Any] = (), effort: Effort | None = None, effort_param: str = LEVEL
) -> RenderOptions:
    """Raises BadRequest where the fields contradict each other, or a variable has a name that is taken."""
    continues = bool(request.continue_final_message)
    if continues and request.add_generation_prompt:
        raise BadRequest(
            "continue_final_message and add_generation_prompt cannot both be true", param="continue_final_message"
        )
    variables = request.chat_template_kwargs or {}
    for name in variables:
        if name in RESERVED or not name.isidentifier():
            shown = name[:64]
            raise BadRequest(
                f"chat_template_kwargs.{shown} is not a variable of a chat template that a request may set",
                param=f"chat_template_kwargs.{shown}",
            )
    if variables and _is_longer(variables, MAX_VARIABLE_CHARS):
        raise BadRequest(
            f"chat_template_kwargs has more than {MAX_VARIABLE_CHARS} characters", param="chat_template_kwargs"
        )
    return RenderOptions(
        add_generation_prompt=not continues and request.add_generation_prompt is not False,
        continue_final_message=continues,
        tools=tools,
        variables={**_switches(request), **variables},
        effort=effort or "",
        effort_param=effort_param,
    )


def _switches(request: TemplateRequest) -> dict[str, Any]:
    """Raises BadRequest where the two contradict each other."""
    thinking = None if request.thinking is None or request.thinking.type == "auto" else request.thinking.type
    asked = {request.enable_thinking, None if thinking is None else thinking != "disabled"} - {None}
    if len(asked) > 1:
        raise BadRequest("enable_thinking and thinking contradict each other", param="thinking")
    return {switch: on for on in asked for switch in SWITCHES}


def _is_longer(value: object, num_chars: int) -> bool:
    """Whether `value` as JSON has more characters. Not all of a body of megabytes is written to find out."""
    lengths = itertools.accumulate(map(len, json.JSONEncoder().iterencode(value)))
    return any(length > num_chars for length in lengths)
