"""Parameters of a request body that have no field in it: ignored ones, unsupported ones, and all others.

Knows names and values of parameters only: no body, no HTTP. What is not here and has no field is unknown: it is
reported, and refused if it is a known name misspelt. Sources: the OpenAI API reference, vLLM's protocol classes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from baton.node.errors import BadRequest

MAX_UNKNOWN = 16
"""Unknown names of one request that are reported, and compared with the known ones. A comparison takes a millisecond of
the event loop, and a body may have a million names."""
MAX_NAME_CHARS = 64
SIMILAR = 0.85
"""Similarity (difflib's ratio) from which on an unknown name is a known one misspelt: one letter of four left out."""

IGNORED = frozenset(
    (
        "metadata",
        "max_tool_calls",
        "prompt_cache_options",
        "prompt_cache_retention",
        "return_mm_kwargs",
        "return_token_offsets",
        "safety_identifier",
        "service_tier",
        "spaces_between_special_tokens",
        "store",
        "stream_interval",
    )
)
"""They change no answer of this server, whatever they say."""

_TOOLS = "tools are those of a chat, under `tools` and `tool_choice`"
_TEXT_ONLY = "only text is supported"
_BEAMS = "beam search is not supported"
_OF_CHATS = "reasoning is that of chats"
_TRANSFER = "this server chooses where KV is computed and sent itself"

UNSUPPORTED: Mapping[str, tuple[tuple[object, ...], str]] = {
    "suffix": (("",), "text cannot be inserted before a suffix"),
    "tools": (([],), _TOOLS),
    "tool_choice": (("none", "auto"), _TOOLS),
    "parallel_tool_calls": ((True, False), _TOOLS),
    "functions": (([],), _TOOLS),
    "function_call": (("none", "auto"), _TOOLS),
    "structural_tag": (("",), "it goes into response_format or structured_outputs"),
    "guided_decoding_backend": (("",), "there is one compiler of grammars"),
    "regex": (("",), "use structured_outputs.regex"),
    "ebnf": (("",), "use structured_outputs.grammar"),
    "grammar": (("",), "use structured_outputs.grammar"),
    "json_schema": (("", {}), "use response_format, or structured_outputs.json"),
    "modalities": ((["text"], []), _TEXT_ONLY),
    "audio": ((), _TEXT_ONLY),
    "mm_processor_kwargs": (({},), _TEXT_ONLY),
    "media_io_kwargs": (({},), _TEXT_ONLY),
    "web_search_options": ((), "there is no search"),
    "moderation": ((), "there is no moderation"),
    "reasoning_effort": ((), _OF_CHATS),
    "include_reasoning": ((True,), _OF_CHATS),
    "thinking_token_budget": ((-1,), _OF_CHATS),
    "verbosity": (("medium",), "the model's answers cannot be made longer or shorter"),
    "use_beam_search": ((False,), _BEAMS),
    "best_of": ((1,), "answers are not ranked"),
    "length_penalty": ((1,), _BEAMS),
    "early_stopping": ((False,), _BEAMS),
    "watermarking": ((False,), "answers have no watermark"),
    "prompt_embeds": (("", []), "prompts are text or token ids"),
    "logits_processors": (([],), "code from clients is not run"),
    "chat_template": ((), "templates are programs, and code from clients is not run"),
    "documents": (([],), "write documents into the messages"),
    "echo": ((False,), "continue_final_message continues an answer"),
    "logprob_token_ids": (([],), "log probabilities are of the likeliest tokens"),
    "return_prompt_text": ((False,), "return_token_ids returns the prompt's token ids"),
    "repetition_detection": (({},), "answers are not stopped for repetition"),
    "routed_experts_prompt_start": ((0,), "the experts that tokens were routed to are not returned"),
    "kv_transfer_params": (({},), _TRANSFER),
    "ec_transfer_params": (({},), _TRANSFER),
    "vllm_xargs": (({},), "there are no extensions to configure"),
    "extra_body": (({},), "OpenAI's Python client takes it, and sends its fields in the body itself: write them there"),
    "options": (({},), "that is Ollama's: write temperature, max_tokens and others into the body itself"),
    "format": (("",), "that is Ollama's: use response_format"),
    "n_predict": ((-1,), "that is llama.cpp's: use max_tokens"),
}
"""Parameter -> the values, besides null, that ask for nothing; and why others are refused."""


def unknown_parameters(
    given: Mapping[str, object],
    fields: Iterable[str],
    unsupported: Mapping[str, tuple[tuple[object, ...], str]] = UNSUPPORTED,
) -> tuple[str, ...]:
    """The first names in `given`, parameters without a field, that mean nothing here; `fields`: those that have one.

    Raises BadRequest for one with an effect that this server does not have, or whose name is nearly a known one.
    """
    found: list[str] = []
    for name, value in given.items():
        if value is None or name in IGNORED:
            continue
        if name in unsupported:
            check_unsupported(name, value, *unsupported[name])
        elif len(found) < MAX_UNKNOWN:
            check_spelling(name, (*fields, *IGNORED, *unsupported))
            found.append(name[:MAX_NAME_CHARS])
    return tuple(found)


def check_spelling(name: str, known: Iterable[str], parent: str = "") -> None:
    """Raises BadRequest if `name` is nearly one of `known`; `parent` is the object that it is in."""
    by_letters = {_letters(each): each for each in known}
    close = difflib.get_close_matches(_letters(name[:MAX_NAME_CHARS]), by_letters, n=1, cutoff=SIMILAR)
    if close:
        shown, meant = (
            f"{parent}.{each}" if parent else each for each in (name[:MAX_NAME_CHARS], by_letters[close[0]])
        )
        raise BadRequest(
            f"Unrecognized request argument supplied: {shown}. Did you mean {meant}?",
            param=shown,
            code="unknown_parameter",
        )


def check_unsupported(name: str, value: object, neutral: tuple[object, ...], reason: str) -> None:
    """Raises BadRequest unless `value` asks for nothing."""
    if value not in neutral:
        raise BadRequest(f"{name} is not supported: {reason}", param=name, code="unsupported_parameter")


def _letters(name: str) -> str:
    """`maxTokens` and `max-tokens` differ from `max_tokens` in how they are written only."""
    return "".join(letter for letter in name.lower() if letter.isalnum())
