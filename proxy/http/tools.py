"""The tools that a chat declares, and which of them its answer may call. Knows no format of calls and no template.

Calls that are forced (`tool_choice` required or of one function, `strict`) need a grammar and are refused. Source: the
OpenAI API reference (chat).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from baton.node.errors import BadRequest

MAX_TOOLS = 512
MAX_TOOLS_CHARS = 1 << 18


class DeclaredFunction(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]{1,64}\z")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class DeclaredTool(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)

    type: Literal["function"]
    function: DeclaredFunction


class ToolFields(BaseModel):
    """The fields of a chat; null means "not given"."""

    tools: Annotated[list[DeclaredTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


@dataclass(frozen=True, slots=True)
class ToolRequest:
    """What the model may call; nothing by default."""

    schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of the parameters of each function, by its name."""
    shown: Sequence[Mapping[str, Any]] = ()
    """The tools as the template gets them."""
    max_calls: int | None = None
    """None: any number."""


def tool_request(fields: ToolFields) -> ToolRequest:
    """Raises BadRequest."""
    tools = fields.tools or []
    choice = fields.tool_choice or "auto"
    if choice not in ("none", "auto"):
        what = "an answer cannot be made to call a function yet: must be none or auto"
        raise BadRequest(f"tool_choice is not supported: {what}", param="tool_choice", code="unsupported_parameter")
    if choice == "none" or not tools:
        return ToolRequest()
    schemas: dict[str, Mapping[str, Any]] = {}
    for index, tool in enumerate(tools):
        where = f"tools.{index}.function"
        if tool.function.name in schemas:
            raise BadRequest(f"{where}.name is that of an earlier tool", param=f"{where}.name")
        if tool.function.strict:
            what = "arguments are not bound to their schema yet"
            raise BadRequest(
                f"{where}.strict is not supported: {what}", param=f"{where}.strict", code="unsupported_parameter"
            )
        schemas[tool.function.name] = tool.function.parameters or {}
    shown = [tool.model_dump(exclude_unset=True) for tool in tools]
    if len(json.dumps(shown)) > MAX_TOOLS_CHARS:
        raise BadRequest(f"tools have more than {MAX_TOOLS_CHARS} characters", param="tools")
    return ToolRequest(schemas, shown, 1 if fields.parallel_tool_calls is False else None)
