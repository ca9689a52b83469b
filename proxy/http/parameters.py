"""Parameters of a request body that have no field in it: ignored ones, unsupported ones, and all others.

Knows names and values of parameters only: no body, no HTTP. Source: the OpenAI API reference.
"""

from __future__ import annotations

from collections.abc import Mapping

from baton.node.errors import BadRequest

IGNORED = frozenset(
    (
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
    )
)
UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"], []),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "moderation": (),
}
"""Parameter -> the values, besides null, that ask for nothing."""


def check_extra(given: Mapping[str, object]) -> None:
    """Raises BadRequest for a parameter that would have an effect which this server does not have."""
    for name, value in given.items():
        if name in IGNORED or (name in UNSUPPORTED and (value is None or value in UNSUPPORTED[name])):
            continue
        shown = name[:64]
        if name in UNSUPPORTED:
            raise BadRequest(f"{name} is not supported by this server", param=name, code="unsupported_parameter")
        raise BadRequest(f"Unrecognized request argument supplied: {shown}", param=shown, code="unknown_parameter")
