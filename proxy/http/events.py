"""The typed stream between detokeniser and HTTP: what each choice of an answer consists of, event by event.

The assembler makes the events, encoders write them in the shape of one API, streamed or at once. Those of reasoning and
calls are made by `formats`. Knows no JSON, no HTTP and no tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from baton.proxy.formats.events import CallArguments, CallBegin, CallEnd, ReasoningText


class TokenLogprob(msgspec.Struct, frozen=True):
    """One token with its probability, as bytes: it may be a part of a character."""

    token: bytes
    logprob: float | None
    """None: the first token of a prompt."""
    top: tuple[tuple[bytes, float], ...]
    """The most likely tokens at this place."""
    offset_chars: int
    """Characters of the answer before this token."""


class RankedToken(msgspec.Struct, frozen=True):
    """A token at one place of a prompt."""

    logprob: float
    rank: int
    """1: the likeliest."""
    token: bytes


PromptEntry = dict[int, RankedToken]
"""The token of one place of a prompt, and the likeliest ones there, by id."""


class PromptRanks(msgspec.Struct, frozen=True):
    """The log probabilities of the choice's prompt, where the client asked for `prompt_logprobs`."""

    entries: tuple[PromptEntry | None, ...]
    """One a token; the first has none."""


class PromptIds(msgspec.Struct, frozen=True):
    """The token ids of the choice's prompt; the first event, where the client asked for ids."""

    token_ids: tuple[int, ...]


class Content(msgspec.Struct, frozen=True, gc=False):
    """Visible text. It is empty where tokens have log probabilities or ids to show but complete no character yet."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    token_ids: tuple[int, ...] = ()
    """Empty where the client did not ask for them."""


class ChoiceEnd(msgspec.Struct, frozen=True):
    """The choice is complete."""

    reason: str
    """"stop" | "length" | "tool_calls"."""
    stop_reason: str | int | None = None
    """The stop string, or the id of the client's stop token, that ended it; None for an end token of the model."""


class TokenUsage(msgspec.Struct, frozen=True):
    """What a choice took so far; follows its ChoiceEnd as the last event, and each delta where a client asks for it."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int = 0
    """Of the completion, markers included."""
    accepted_prediction_tokens: int | None = None
    """Of the completion, those that were guessed from the client's prediction; None: there was none."""
    rejected_prediction_tokens: int | None = None
    """Of the prediction, those that were not accepted so far."""


Event = PromptIds | PromptRanks | Content | ReasoningText | CallBegin | CallArguments | CallEnd | ChoiceEnd | TokenUsage


class CallText(msgspec.Struct, frozen=True):
    """What some events say of one call."""

    index: int
    id: str
    """Empty, like the name, where the call had begun before."""
    name: str
    arguments: str


class ChoiceText(msgspec.Struct, frozen=True, gc=False):
    """Consecutive events of one choice joined: those of one delta for a chunk, all of them for a whole answer."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish: str
    """Empty while the choice is not complete."""
    stop_reason: str | int | None = None
    token_ids: tuple[int, ...] = ()
    prompt_ids: tuple[int, ...] = ()
    prompt_ranks: tuple[PromptEntry | None, ...] = ()
    usage: TokenUsage | None = None
    """So far, where the events have it."""
    reasoning: str = ""
    calls: tuple[CallText, ...] = ()


def join_events(index: int, events: Sequence[Event]) -> ChoiceText:
    """What `events` say."""
    if len(events) == 1 and type(event := events[0]) is Content:  # what most tokens make
        return ChoiceText(index, event.text, event.logprobs, "", None, event.token_ids)
    texts: list[str] = []
    logprobs: list[TokenLogprob] = []
    token_ids: list[int] = []
    prompt_ids: tuple[int, ...] = ()
    prompt_ranks: tuple[PromptEntry | None, ...] = ()
    finish, stop_reason, usage = "", None, None
    reasoning: list[str] = []
    calls: list[Event] = []
    for event in events:
        if type(event) is Content:
            texts.append(event.text)
            logprobs.extend(event.logprobs)
            token_ids.extend(event.token_ids)
        elif type(event) is ChoiceEnd:
            finish, stop_reason = event.reason, event.stop_reason
        elif type(event) is PromptIds:
            prompt_ids = event.token_ids
        elif type(event) is PromptRanks:
            prompt_ranks = event.entries
        elif type(event) is TokenUsage:
            usage = event
        elif type(event) is ReasoningText:
            reasoning.append(event.text)
        else:
            calls.append(event)
    return ChoiceText(
        *(
            index,
            "".join(texts),
            tuple(logprobs),
            finish,
            stop_reason,
            tuple(token_ids),
            prompt_ids,
            prompt_ranks,
            usage,
        ),
        reasoning="".join(reasoning),
        calls=_join_calls(calls),
    )


def _join_calls(events: Sequence[Event]) -> tuple[CallText, ...]:
    begun: dict[int, CallBegin] = {}
    arguments: dict[int, list[str]] = {}
    for event in events:
        if type(event) is CallBegin:
            begun[event.index] = event
            arguments[event.index] = []
        elif type(event) is CallArguments:
            arguments.setdefault(event.index, []).append(event.text)
    return tuple(
        CallText(index, begun[index].id, begun[index].name, "".join(texts))
        if index in begun
        else CallText(index, "", "", "".join(texts))
        for index, texts in arguments.items()
    )


def chunks_of(events: Sequence[Event]) -> Sequence[Sequence[Event]]:
    """`events` cut so that no part has more than one call, or a call and something else: what clients can read."""
    if not any(isinstance(event, CallBegin | CallArguments) for event in events):
        return [events]
    parts: list[list[Event]] = []
    before: object = None
    for event in events:
        subject = ("call", event.index) if isinstance(event, CallBegin | CallArguments) else type(event)
        if subject == before or (isinstance(event, CallEnd | TokenUsage) and parts):
            parts[-1].append(event)
        else:
            parts.append([event])
        before = before if isinstance(event, CallEnd) else subject
    return parts


def total_usage(usages: Sequence[TokenUsage], choices_per_prompt: int) -> TokenUsage:
    """The usage of a whole request: a prompt counts once, however many choices it has."""
    if len(usages) == 1:
        return usages[0]
    prompt_tokens = completion_tokens = cached_tokens = reasoning_tokens = 0
    for index, usage in enumerate(usages):
        completion_tokens += usage.completion_tokens
        reasoning_tokens += usage.reasoning_tokens
        if index % choices_per_prompt == 0:
            prompt_tokens += usage.prompt_tokens
            cached_tokens += usage.cached_tokens
    return TokenUsage(prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens)
