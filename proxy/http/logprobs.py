"""Log probabilities in the shapes of OpenAI's APIs and of vLLM's: of a completion, a chat, and a prompt.

Knows no encoder, no HTTP and no tokenizer. Source: the OpenAI API reference; vLLM's `prompt_logprobs`.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from baton.proxy.http.events import PromptEntry, TokenLogprob


class CompletionLogprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class _Ranked(msgspec.Struct):
    logprob: float
    rank: int
    decoded_token: str


PromptRanks = list[dict[str, _Ranked] | None] | msgspec.UnsetType
"""vLLM's field; absent unless asked for."""


class _TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[_TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatLogprob]
    refusal: None = None


def prompt_ranks(entries: Sequence[PromptEntry | None]) -> PromptRanks:
    """vLLM's shape: of each token of the prompt, by id. Absent where there is none."""
    if not entries:
        return msgspec.UNSET
    return [
        None
        if entry is None
        else {
            str(token_id): _Ranked(_finite(ranked.logprob), ranked.rank, _shown(ranked.token))
            for token_id, ranked in entry.items()
        }
        for entry in entries
    ]


def completion_logprobs(tokens: Sequence[TokenLogprob]) -> CompletionLogprobs:
    """The legacy shape; the drawn token is always among the most likely, so there may be one more than asked for."""
    return CompletionLogprobs(
        tokens=[_shown(token.token) for token in tokens],
        token_logprobs=[None if token.logprob is None else _finite(token.logprob) for token in tokens],
        top_logprobs=[
            None if token.logprob is None else _by_text((*token.top, (token.token, token.logprob))) for token in tokens
        ],
        text_offset=[token.offset_chars for token in tokens],
    )


def _by_text(tokens: Sequence[tuple[bytes, float]]) -> dict[str, float]:
    """Several tokens may have one text (a comma, and the byte of a comma): the likeliest of them counts."""
    found: dict[str, float] = {}
    for token, logprob in tokens:
        shown, value = _shown(token), _finite(logprob)
        found[shown] = max(value, found.get(shown, value))
    return found


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> list[ChatLogprob]:
    """The shape of chats and of the Responses API, with the bytes of each token."""
    return [
        ChatLogprob(
            _shown(token.token),
            _finite(token.logprob or 0.0),
            list(token.token),
            [_TopLogprob(_shown(piece), _finite(value), list(piece)) for piece, value in token.top],
        )
        for token in tokens
    ]


def _shown(token: bytes) -> str:
    """The token as text; a part of a character in the form of OpenAI's API, so that no two tokens look alike."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI and vLLM use -9999 for a token that cannot be drawn."""
    return max(logprob, -9999.0)
