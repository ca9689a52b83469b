"""Tools of the Messages API as those of a chat: templates, grammars and readers of calls know only these.

Tools that Anthropic's servers run, or whose schema only its models know, have a type of their own. They are left out
and named, unless an answer must use one. Source: the Anthropic API reference (Messages, tool use).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from baton.node.errors import BadRequest
from baton.proxy.http.parameters import MAX_NAME_CHARS
from baton.proxy.http.tools import MAX_TOOLS, DeclaredFunction, DeclaredTool, ToolFields, ToolRequest, tool_request

_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,128}")


class ClientTool(BaseModel):
    """A tool of the client's, or with a `type` one of Anthropic's; hints beside it (`cache_control`) mean nothing."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)

    type: Annotated[str, Field(max_length=256)] | None = None
    name: Annotated[str, Field(max_length=4096)] | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def is_hosted(self) -> bool:
        return self.type not in (None, "custom")


class ToolChoice(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    type: Literal["auto", "any", "tool", "none"]
    name: Annotated[str, Field(max_length=4096)] | None = None
    disable_parallel_tool_use: bool | None = None


ToolList = Annotated[list[ClientTool], Field(max_length=MAX_TOOLS, fail_fast=True)]


def hosted_names(tools: Sequence[ClientTool]) -> tuple[str, ...]:
    """Those that are left out."""
    return tuple((tool.name or tool.type or "")[:MAX_NAME_CHARS] for tool in tools if tool.is_hosted)


def requested_tools(tools: Sequence[ClientTool], choice: ToolChoice | None) -> ToolRequest:
    """What a chat would ask for; raises BadRequest."""
    declared: dict[str, DeclaredTool] = {}
    places: dict[str, str] = {}
    for index, tool in enumerate(tools):
        if tool.is_hosted:
            continue
        made = _declared(index, tool)
        name = made.function.name
        if name in declared:
            raise BadRequest(f"tools.{index}.name is that of an earlier tool", param=f"tools.{index}.name")
        declared[name], places[name] = made, f"tools.{index}.input_schema"
    fields = ToolFields.model_construct(
        tools=list(declared.values()),
        tool_choice=_choice(choice, declared, hosted_names(tools)),
        parallel_tool_calls=False if choice is not None and choice.disable_parallel_tool_use else None,
    )
    found = tool_request(fields)
    return replace(found, params={name: places[name] for name in found.params})


def _declared(index: int, tool: ClientTool) -> DeclaredTool:
    where = f"tools.{index}"
    if tool.name is None or not _NAME.fullmatch(tool.name):
        what = "must have 1 to 128 letters, digits, underscores, dots and hyphens"
        raise BadRequest(f"{where}.name {what}", param=f"{where}.name")
    where = f"{where}.input_schema"
    if tool.input_schema is None:
        raise BadRequest(f"{where}: Field required", param=where)
    if tool.input_schema.get("type", "object") != "object":
        raise BadRequest(f"{where} must be the JSON schema of an object", param=where)
    given: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    given |= {"description": tool.description} if tool.description is not None else {}
    given |= {"strict": tool.strict} if tool.strict is not None else {}
    function = DeclaredFunction.model_construct(**given)
    return DeclaredTool.model_construct(type="function", function=function)


def _choice(choice: ToolChoice | None, names: Collection[str], hosted: Sequence[str]) -> Any:
    """In the words of a chat."""
    if choice is None or choice.type in ("auto", "none"):
        return None if choice is None else choice.type
    if choice.type == "any":
        if not names:
            raise BadRequest("tool_choice any needs tools that this server can offer", param="tool_choice")
        return "required"
    if choice.name not in names:
        is_hosted = choice.name in hosted
        what = "is run by Anthropic's servers, and not available here" if is_hosted else "is none of the tools"
        raise BadRequest(f"tool_choice.name {what}", param="tool_choice.name")
    return {"type": "function", "function": {"name": choice.name}}
