"""The forms in which a prompt may be given, made one: a text, or token ids.

Raises TypeError and ValueError for what has none of these forms, before any work; what a model makes of a prompt the
server says. Knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class OfflinePrompt:
    """One prompt."""

    text: str | None
    """None where token ids were given."""
    token_ids: tuple[int, ...] = ()
    cache_salt: str = ""
    """Only prompts of the same salt share KV; empty: those without."""


def read_prompts(prompts: Any) -> list[OfflinePrompt]:
    """One prompt or a list of them, each a str, {"prompt": str} or {"prompt_token_ids": [int]}.

    A dict may have a "cache_salt" too.
    """
    if isinstance(prompts, str | Mapping):
        return [_read_prompt(prompts, "prompts")]
    if not isinstance(prompts, Sequence):
        raise TypeError(f"prompts must be a str, a dict or a list of these, not {type(prompts).__name__}")
    return [_read_prompt(prompt, f"prompts[{index}]") for index, prompt in enumerate(prompts)]


def _read_prompt(prompt: Any, where: str) -> OfflinePrompt:
    if isinstance(prompt, str):
        return OfflinePrompt(prompt)
    if not isinstance(prompt, Mapping):
        raise TypeError(f"{where} must be a str or a dict, not {type(prompt).__name__}")
    unknown = [name for name in prompt if name not in ("prompt", "prompt_token_ids", "cache_salt")]
    if unknown:
        raise ValueError(f"{where}: {unknown[0]!r} is not supported")
    ids, text, salt = prompt.get("prompt_token_ids"), prompt.get("prompt"), prompt.get("cache_salt") or ""
    if not isinstance(salt, str):
        raise TypeError(f"{where}['cache_salt'] must be a str")
    if ids is not None:
        if not isinstance(ids, Sequence) or not all(isinstance(token, int) for token in ids):
            raise TypeError(f"{where}['prompt_token_ids'] must be a list of int")
        return OfflinePrompt(text if isinstance(text, str) else None, tuple(ids), salt)
    if not isinstance(text, str):
        raise TypeError(f"{where} needs 'prompt' or 'prompt_token_ids'")
    return OfflinePrompt(text, cache_salt=salt)


def read_conversations(messages: Any) -> list[list[Mapping[str, Any]]]:
    """One conversation or a list of them; a conversation is a list of messages {"role": ..., "content": ...}."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise TypeError(f"messages must be a list, not {type(messages).__name__}")
    if messages and all(isinstance(entry, Mapping) for entry in messages):
        return [list(messages)]
    conversations = []
    for index, conversation in enumerate(messages):
        if not isinstance(conversation, Sequence) or not all(isinstance(entry, Mapping) for entry in conversation):
            raise TypeError(f"messages[{index}] must be a list of dicts")
        conversations.append(list(conversation))
    return conversations


def one_each(params: P | Sequence[P] | None, count: int) -> list[P | None]:
    """Sampling parameters for each of `count` prompts; one object serves all."""
    if params is None or not isinstance(params, Sequence):
        return [params] * count
    if len(params) != count:
        raise ValueError(f"{count} prompts, but {len(params)} sampling_params")
    return list(params)
