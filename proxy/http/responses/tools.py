"""Tools of the Responses API, as those of a chat: templates, grammars and readers of calls know only these.

    function     obeyed
    namespace    its tools, named after it
    custom       a function with one text, which becomes free text again in the answer
    other types  run on OpenAI's servers, or known to its models only: left out and named, unless an answer must use one

Source: the OpenAI API reference (Responses).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from baton.node.errors import BadRequest
from baton.proxy.http.parameters import MAX_NAME_CHARS
from baton.proxy.http.parsing import parse_value
from baton.proxy.http.tools import MAX_TOOLS, DeclaredFunction, DeclaredTool

FREE_TEXT = "input"
"""The parameter of a function that stands for a custom tool."""
_CALLABLE = ("function", "custom")
_CalledName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]{1,128}\z")]


class _Tool(BaseModel):
    """Hints beside it (`defer_loading`, `output_schema`) mean nothing here."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)

    name: _CalledName
    description: str | None = None


class FlatFunction(_Tool):
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class CustomFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    type: str
    syntax: str = ""
    definition: str = ""


class CustomTool(_Tool):
    format: CustomFormat | None = None


class ToolNamespace(_Tool):
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS)]


_MODELS = (FlatFunction, CustomFormat, CustomTool, ToolNamespace)
_FIELD_NAMES = frozenset(name for model in _MODELS for name in model.model_fields)


@dataclass(frozen=True, slots=True)
class CalledTool:
    """How the answer writes a call."""

    name: str
    namespace: str | None
    is_custom: bool


class GivenTools:
    """The tools of one request."""

    def __init__(self, given: Sequence[Mapping[str, Any]]) -> None:
        """Raises BadRequest."""
        self.declared: list[DeclaredTool] = []
        """As a chat has them."""
        self.called: dict[str, CalledTool] = {}
        """By the name that the model knows."""
        self.params: dict[str, str] = {}
        """Where the schema of each is in the request, for errors."""
        self.shown: list[Mapping[str, Any]] = []
        """As the answer repeats them, without those that are left out."""
        self.ignored: dict[str, None] = {}
        """Types of the tools that are left out."""
        for index, tool in enumerate(given):
            self._add(tool, f"tools.{index}")

    def choice(self, given: str | Mapping[str, Any] | None) -> str | dict[str, Any] | None:
        """`tool_choice` as a chat has it; raises BadRequest."""
        if given is None or isinstance(given, str):
            if given == "required" and not self.declared:
                raise BadRequest("tool_choice is required, but there is no tool to call", param="tool_choice")
            return given
        kind = given.get("type")
        if kind in _CALLABLE:
            return self._chosen(given, "tool_choice")
        if kind != "allowed_tools":
            raise BadRequest(f"tool_choice.type {_not_supported(kind)}", param="tool_choice.type")
        mode, tools = given.get("mode", "auto"), given.get("tools")
        if mode not in ("auto", "required"):
            raise BadRequest("tool_choice.mode must be auto or required", param="tool_choice.mode")
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise BadRequest("tool_choice.tools must be an array of tools", param="tool_choice.tools")
        allowed = [
            self._chosen(tool, f"tool_choice.tools.{index}")
            for index, tool in enumerate(tools)
            if tool.get("type") in _CALLABLE
        ]
        if not allowed:
            raise BadRequest("tool_choice.tools has no function to call", param="tool_choice.tools")
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": allowed}}

    def _chosen(self, given: Mapping[str, Any], where: str) -> dict[str, Any]:
        name, namespace = given.get("name"), given.get("namespace")
        for known, tool in self.called.items():
            if name in (known, tool.name) and namespace in (None, tool.namespace):
                return {"type": "function", "function": {"name": known}}
        raise BadRequest(f"{where}.name is no function of tools", param=f"{where}.name")

    def _add(self, given: Mapping[str, Any], where: str, namespace: str | None = None) -> None:
        kind = given.get("type")
        if not isinstance(kind, str):
            raise BadRequest(f"{where}.type is missing", param=f"{where}.type")
        path = where.split(".")
        if kind == "function":
            function = parse_value(FlatFunction, given, path, _FIELD_NAMES, {})
            self._declare(where, function, namespace, function.parameters, function.strict)
            if namespace is None:
                self.shown.append({"description": None, "parameters": None, "strict": False, **given})
        elif kind == "custom":
            custom = parse_value(CustomTool, given, path, _FIELD_NAMES, {})
            self._declare(where, custom, namespace, _free_text(custom.format), None)
            if namespace is None:
                self.shown.append(given)
        elif kind == "namespace" and namespace is None:
            group = parse_value(ToolNamespace, given, path, _FIELD_NAMES, {})
            for index, tool in enumerate(group.tools):
                self._add(tool, f"{where}.tools.{index}", group.name)
            self.shown.append(given)
        else:
            self.ignored[kind[:MAX_NAME_CHARS]] = None

    def _declare(
        self, where: str, tool: _Tool, namespace: str | None, parameters: dict[str, Any] | None, strict: bool | None
    ) -> None:
        name = flat_name(namespace, tool.name)
        if name in self.called:
            raise BadRequest(f"{where}.name is that of an earlier tool", param=f"{where}.name")
        if len(self.called) == MAX_TOOLS:
            raise BadRequest(f"tools has more than {MAX_TOOLS} functions", param="tools")
        if (parameters or {}).get("type", "object") != "object":
            raise BadRequest(f"{where}.parameters must be the JSON schema of an object", param=f"{where}.parameters")
        self.params[name] = f"{where}.parameters"
        self.called[name] = CalledTool(tool.name, namespace, isinstance(tool, CustomTool))
        # Only what is given: the template shows all of it to the model, as it does in a chat.
        fields = {"description": tool.description, "parameters": parameters, "strict": strict}
        given: dict[str, Any] = {key: value for key, value in fields.items() if value is not None}
        function = DeclaredFunction.model_construct(name=name, **given)
        self.declared.append(DeclaredTool.model_construct(type="function", function=function))


def flat_name(namespace: str | None, name: str) -> str:
    """The name of a tool, in a namespace perhaps, that the model knows: letters and underscores, as in any language."""
    if not namespace:
        return name
    return f"{namespace}{name}" if namespace.endswith("_") else f"{namespace}__{name}"


def _free_text(form: CustomFormat | None) -> dict[str, Any]:
    """The parameters of a function that stands for a custom tool. Its grammar is shown to the model, not enforced."""
    text = {"type": "string"}
    if form is not None and form.definition:
        text["description"] = f"Text of this {form.syntax} grammar:\n{form.definition}"
    return {"type": "object", "properties": {FREE_TEXT: text}, "required": [FREE_TEXT], "additionalProperties": False}


def _not_supported(kind: object) -> str:
    return f"{str(kind)[:MAX_NAME_CHARS]!r} is not supported: answers can be made to call functions and custom tools"
