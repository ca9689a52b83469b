"""The tools that a chat declares, and which of them its answer may or must call.

All tools are shown to the model, whichever it may call, so that prompts keep their prefix. Knows no format of calls and
no template. Source: the OpenAI API reference (chat).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from baton.node.errors import BadRequest

MAX_TOOLS = 512
MAX_TOOLS_CHARS = 1 << 18
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


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
    """Of the parameters of each function that it may call, by its name."""
    shown: Sequence[Mapping[str, Any]] = ()
    """All tools, as the template gets them."""
    max_calls: int | None = None
    """None: any number."""
    params: Mapping[str, str] = field(default_factory=dict)
    """Where the request has the parameters of each function, for errors."""
    strict: Mapping[str, bool | None] = field(default_factory=dict)
    """Whether each function's arguments must fit its schema; None: not said."""
    forced: bool = False
    """The answer is calls and nothing else."""
    named: bool = False
    """It is one call of the one function that there is in `schemas`."""
    narrowed: bool = False
    """There are functions that it may not call."""


@dataclass(frozen=True, slots=True)
class _Choice:
    """What `tool_choice` says."""

    forced: bool = False
    named: bool = False
    names: frozenset[str] | None = None
    """Functions that may be called; None: all."""


def tool_request(fields: ToolFields) -> ToolRequest:
    """Raises BadRequest."""
    tools, given = fields.tools or [], fields.tool_choice
    if not tools and given not in (None, "none", "auto"):
        raise BadRequest("tool_choice needs tools to choose from", param="tool_choice")
    if given == "none" or not tools:
        return ToolRequest()
    declared = {tool.function.name: (f"tools.{index}.function", tool.function) for index, tool in enumerate(tools)}
    _check_declared(tools)
    choice = _choice_of(given, declared)
    called = {name: each for name, each in declared.items() if choice.names is None or name in choice.names}
    shown = [tool.model_dump(exclude_unset=True) for tool in tools]
    if len(json.dumps(shown)) > MAX_TOOLS_CHARS:
        raise BadRequest(f"tools have more than {MAX_TOOLS_CHARS} characters", param="tools")
    return ToolRequest(
        schemas={name: _schema(function) for name, (_, function) in called.items()},
        shown=shown,
        max_calls=1 if choice.named or fields.parallel_tool_calls is False else None,
        params={name: f"{where}.parameters" for name, (where, _) in called.items()},
        strict={name: function.strict for name, (_, function) in called.items()},
        forced=choice.forced,
        named=choice.named,
        narrowed=len(called) < len(declared),
    )


def _check_declared(tools: Sequence[DeclaredTool]) -> None:
    names: set[str] = set()
    for index, tool in enumerate(tools):
        where = f"tools.{index}.function"
        if tool.function.name in names:
            raise BadRequest(f"{where}.name is that of an earlier tool", param=f"{where}.name")
        names.add(tool.function.name)
        if (tool.function.parameters or {}).get("type", "object") != "object":
            where = f"{where}.parameters"
            raise BadRequest(f"{where} must be the JSON schema of an object", param=where)


def _schema(function: DeclaredFunction) -> Mapping[str, Any]:
    """Without `parameters`, a function has none."""
    return NO_PARAMETERS if function.parameters is None else function.parameters


def _choice_of(given: str | Mapping[str, Any] | None, declared: Collection[str]) -> _Choice:
    """Raises BadRequest."""
    if given is None or isinstance(given, str):
        return _Choice(forced=given == "required")
    kind = given.get("type")
    if kind == "function":
        name = _function_name(given, "tool_choice", declared)
        return _Choice(forced=True, named=True, names=frozenset((name,)))
    if kind == "allowed_tools":
        return _allowed(given.get("allowed_tools"), declared)
    what = "must be none, auto, required, or an object of type function or allowed_tools"
    raise BadRequest(f"tool_choice {what}", param="tool_choice")


def _allowed(given: Any, declared: Collection[str]) -> _Choice:
    where = "tool_choice.allowed_tools"
    if not isinstance(given, Mapping) or given.get("mode") not in ("auto", "required"):
        raise BadRequest(f"{where}.mode must be auto or required", param=f"{where}.mode")
    tools = given.get("tools")
    if not isinstance(tools, list) or not tools:
        raise BadRequest(f"{where}.tools must be an array of functions", param=f"{where}.tools")
    names = (_function_name(tool, f"{where}.tools.{index}", declared) for index, tool in enumerate(tools))
    return _Choice(forced=given["mode"] == "required", names=frozenset(names))


def _function_name(given: Any, where: str, declared: Collection[str]) -> str:
    """Of `{"type": "function", "function": {"name": ...}}`."""
    function = given.get("function") if isinstance(given, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or name not in declared:
        raise BadRequest(f"{where}.function.name is no function of tools", param=f"{where}.function.name")
    return name
