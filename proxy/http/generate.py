"""One request's generations, from the engine's tokens to pieces of text; several run at once and fail together.

`Assembler` is the pure half: tokens in, text out. Knows no HTTP and no JSON.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from baton.node.errors import InvariantBroken
from baton.node.messages.control import Logprob
from baton.proxy.http.answers import TokenLogprob
from baton.proxy.http.failures import kind_of
from baton.proxy.http.prepare import Generation
from baton.proxy.interface import Delta, Engine
from baton.proxy.metrics.meter import CANCELLED, GenerationMeter
from baton.proxy.metrics.timeline import Timeline
from baton.proxy.text.model_text import ModelText
from baton.proxy.text.stop import StopMatcher


@dataclass(frozen=True, slots=True)
class Piece:
    """What one delta adds to one generation; with a `finish` it is the last."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...]
    num_tokens: int
    cached_tokens: int
    finish: str


@dataclass(frozen=True, slots=True)
class StopRule:
    strings: tuple[str, ...]
    include: bool
    """Leave what stopped the text in it."""


class Assembler:
    """Text of one generation: detokenised, ended at a stop string, with log probabilities if they come."""

    def __init__(self, generation: Generation, text: ModelText, stop: StopRule) -> None:
        self._generation = generation
        self._text = text
        self._detokenizer = text.detokenizer()
        self._stop = StopMatcher(stop.strings, include=stop.include)
        self._include_stop = stop.include
        self._num_tokens = 0
        self._num_chars = 0
        """Characters detokenised so far, held ones included."""

    def feed(self, delta: Delta) -> Piece:
        """The piece that `delta` makes; tokens after a stop string are dropped, and not counted."""
        texts: list[str] = []
        logprobs: list[TokenLogprob] = []
        finish = ""
        count = 0
        for place, token_id in enumerate(delta.ids):
            if delta.logprobs:
                logprobs.append(self._logprob(token_id, delta.logprobs[place]))
            last = place == len(delta.ids) - 1
            text, matched = self._push(token_id, hidden=last and self._is_stop_token(token_id, delta.finish))
            texts.append(text)
            count += 1
            if matched:
                finish = "stop"
                break
        if not finish and delta.finish:
            text, matched = self._end()
            texts.append(text)
            finish = "stop" if matched else delta.finish
        return Piece(self._generation.index, "".join(texts), tuple(logprobs), count, delta.cached_tokens, finish)

    def _push(self, token_id: int, *, hidden: bool) -> tuple[str, str]:
        """The text that may go out with this token, and the stop string that it completed, or ""."""
        self._num_tokens += 1
        return ("", "") if hidden else self._match(self._detokenizer.push(token_id))

    def _match(self, text: str) -> tuple[str, str]:
        """Stop strings count from the token on that fulfils min_tokens; text before it goes out unread."""
        self._num_chars += len(text)
        if self._num_tokens < self._generation.sampling.min_tokens:
            return text, ""
        return self._stop.push(text)

    def _end(self) -> tuple[str, str]:
        text, matched = self._match(self._detokenizer.flush())
        return (text, matched) if matched else (text + self._stop.flush(), "")

    def _is_stop_token(self, token_id: int, finish: str) -> bool:
        """A token that ended the answer is no part of its text, unless the client asked for what stopped it."""
        stopped = finish == "stop" and token_id in self._generation.sampling.stop_token_ids
        return stopped and not self._include_stop

    def _logprob(self, token_id: int, logprob: Logprob) -> TokenLogprob:
        top = tuple((self._text.token_bytes(token), value) for token, value in logprob.top)
        return TokenLogprob(self._text.token_bytes(token_id), logprob.logprob, top, self._num_chars)


async def pieces(
    engine: Engine,
    request_id: str,
    generation: Generation,
    assembler: Assembler,
    track: Callable[[], GenerationMeter],
    timeline: Timeline,
    *,
    timeout_s: float,
    priority: int,
    session_key: bytes,
) -> AsyncGenerator[Piece, None]:
    """Pieces of one generation up to its finish; closing this, or a stop string, cancels it at the engine.

    `track` begins its measurement; nothing happens before the first iteration.
    """
    outcome = CANCELLED
    measured = track()
    deltas = engine.generate(
        request_id,
        generation.prompt_ids,
        generation.sampling,
        timeout_s=timeout_s,
        priority=priority,
        session_key=session_key,
        timeline=timeline,
    )
    try:
        async with aclosing(deltas):
            async for delta in deltas:
                piece = assembler.feed(delta)
                if piece.num_tokens:
                    measured.tokens(piece.num_tokens, piece.cached_tokens)
                outcome = piece.finish or CANCELLED
                yield piece
                if piece.finish:
                    return
        raise InvariantBroken(f"generation {request_id} ended without a finish")
    except Exception as error:
        outcome = kind_of(error)
        raise
    finally:
        measured.close(outcome)


async def merge(sources: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """Pieces of all sources as they come; the first error ends all of them and is raised here."""
    if len(sources) == 1:  # nothing to merge: spare each token a queue and a task switch
        async with aclosing(sources[0]) as source:
            async for piece in source:
                yield piece
        return
    queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue(maxsize=2 * len(sources))
    tasks = [asyncio.create_task(_pump(source, queue)) for source in sources]
    try:
        async for piece in _drain(queue, len(tasks)):
            yield piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(source: AsyncGenerator[Piece, None], queue: asyncio.Queue[Piece | BaseException | None]) -> None:
    """Move one source into the queue, then its end: an error, or None."""
    try:
        async with aclosing(source):
            async for piece in source:
                await queue.put(piece)
    except Exception as error:  # told to the reader, who raises it
        await queue.put(error)
    else:
        await queue.put(None)


async def _drain(queue: asyncio.Queue[Piece | BaseException | None], num_sources: int) -> AsyncIterator[Piece]:
    while num_sources:
        item = await queue.get()
        if isinstance(item, BaseException):
            raise item
        if item is None:
            num_sources -= 1
        else:
            yield item
