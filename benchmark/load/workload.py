"""What the requests of a run are: random lengths, shared prefixes, conversations, a prompt file, or a trace.

Pure: settings' values and a seed in, turns out; the same seed gives the same lengths. `prompts` knows the tokens of a
part, `arrivals` when requests are due.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from baton.benchmark.load.plan import GivenPrompt, Part, PartsPrompt, Turn
from baton.benchmark.load.traces import MOONCAKE_BLOCK_TOKENS, TraceRequest
from baton.node.decoding import DECODE_ERRORS
from baton.node.errors import SettingsError

OWN, PREFIX, BLOCK, WARMUP = range(4)
"""First number of a part's key: a request's own tokens, a shared prefix, a block of a trace, a warm-up."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of random requests. Lengths are uniform between mean * (1 - spread) and mean * (1 + spread)."""

    input_tokens: int
    output_tokens: int
    spread: float
    prefix_tokens: int
    """In front of the input tokens."""
    num_prefixes: int


def random_turns(lengths: Lengths, count: int, turns: int, seed: int) -> list[tuple[Turn, ...]]:
    """`count` conversations of `turns` turns each; a prefix, one of the shared ones, begins the first turn."""
    random = np.random.default_rng([seed, 1])
    found = []
    for number in range(count):
        prefix = Part((PREFIX, int(random.integers(lengths.num_prefixes))), lengths.prefix_tokens)
        conversation = []
        for turn in range(turns):
            own = Part((OWN, number, turn), _draw(random, lengths.input_tokens, lengths.spread))
            parts = (prefix, own) if turn == 0 and prefix.num_tokens else (own,)
            conversation.append(Turn(PartsPrompt(parts), _draw(random, lengths.output_tokens, lengths.spread)))
        found.append(tuple(conversation))
    return found


def warmup_turns(lengths: Lengths, count: int) -> tuple[Turn, ...]:
    """Like the requests of the run in length, like none of them in content."""
    total = lengths.prefix_tokens + lengths.input_tokens
    return tuple(Turn(PartsPrompt((Part((WARMUP, n), total),)), lengths.output_tokens) for n in range(count))


def trace_turn(number: int, request: TraceRequest, length_scale: float) -> Turn:
    """One request of a trace; `length_scale` shrinks prompts, blocks and answers alike, to one token at least."""
    total = max(1, round(request.input_tokens * length_scale))
    max_tokens = max(1, round(request.output_tokens * length_scale))
    if not request.blocks:
        return Turn(PartsPrompt((Part((OWN, number), total),)), max_tokens)
    # Cut at rounded multiples, so that blocks begin at the same places in all prompts.
    ends = [round((i + 1) * MOONCAKE_BLOCK_TOKENS * length_scale) for i in range(len(request.blocks))]
    ends = [*(min(end, total) for end in ends[:-1]), total]
    starts = [0, *ends[:-1]]
    parts = (Part((BLOCK, block), end - start) for block, start, end in zip(request.blocks, starts, ends, strict=True))
    return Turn(PartsPrompt(tuple(part for part in parts if part.num_tokens)), max_tokens)


class _FileLine(msgspec.Struct):
    prompt: str | list[int] | None = None
    messages: list[dict[str, str]] | None = None
    max_tokens: int | None = None


def file_turns(lines: Sequence[str], count: int, default_max_tokens: int) -> list[tuple[Turn, ...]]:
    """`count` prompts of JSON lines {"prompt": text or ids} or {"messages": [...]}, each with "max_tokens" or not.

    A file that is too short is gone through again. Raises SettingsError with the line that is wrong.
    """
    turns = [_file_turn(number, line, default_max_tokens) for number, line in enumerate(lines, 1) if line.strip()]
    if not turns:
        raise SettingsError("the prompt file is empty")
    return [(turns[number % len(turns)],) for number in range(count)]


def with_cancels(conversations: Sequence[tuple[Turn, ...]], rate: float, seed: int) -> list[tuple[Turn, ...]]:
    """A part `rate` of the conversations, chosen at random, is cancelled in the first half of its last answer."""
    random = np.random.default_rng([seed, 2])
    chosen = set(random.permutation(len(conversations))[: round(rate * len(conversations))].tolist())

    def cancelled(turn: Turn) -> Turn:
        return replace(turn, cancel_after=1 + int(random.integers(max(1, turn.max_tokens // 2))))

    return [
        (*turns[:-1], cancelled(turns[-1])) if number in chosen else turns for number, turns in enumerate(conversations)
    ]


def _draw(random: np.random.Generator, mean: int, spread: float) -> int:
    low, high = round(mean * (1 - spread)), round(mean * (1 + spread))
    return max(1, int(random.integers(low, high + 1)))


def _file_turn(number: int, text: str, default_max_tokens: int) -> Turn:
    try:
        line = msgspec.json.decode(text, type=_FileLine)
    except DECODE_ERRORS as error:
        raise SettingsError(f"line {number} of the prompt file: {error}") from None
    if (line.prompt is None) == (line.messages is None):
        raise SettingsError(f"line {number} of the prompt file: one of prompt and messages is needed")
    content: str | tuple[int, ...] | tuple[Mapping[str, str], ...]
    if line.messages is not None:
        content = tuple(line.messages)
    else:
        content = line.prompt if isinstance(line.prompt, str) else tuple(line.prompt or ())
    if not content:
        raise SettingsError(f"line {number} of the prompt file: the prompt is empty")
    return Turn(GivenPrompt(content), line.max_tokens or default_max_tokens)
