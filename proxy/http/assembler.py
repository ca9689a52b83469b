"""From the engine's tokens to the events of one choice: detokenised text, stop strings, log probabilities, usage.

Knows no engine and no HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from baton.node.messages.control import Logprob
from baton.proxy.formats.events import ContentText, FormatEvent
from baton.proxy.formats.machine import FormatMachine
from baton.proxy.http.events import (
    ChoiceEnd,
    Content,
    Event,
    PromptEntry,
    PromptIds,
    PromptRanks,
    TokenLogprob,
    TokenUsage,
)
from baton.proxy.http.prompt_scores import NO_SCORES, PromptScores, ScoreRule
from baton.proxy.http.schema import IdRule, StopRule
from baton.proxy.interface import Delta, Generation
from baton.proxy.text.model_text import ModelText
from baton.proxy.text.stop import StopMatcher


class Assembler:
    """The events of one generation; `finish` is empty until the last of them were made."""

    def __init__(
        self,
        generation: Generation,
        echo: str,
        text: ModelText,
        stop: StopRule,
        ids: IdRule,
        *,
        skip_special_tokens: bool = True,
        scores: ScoreRule = NO_SCORES,
        machine: FormatMachine | None = None,
        named_call: bool = False,
    ) -> None:
        """`machine` reads reasoning and calls out of the answer; stop strings then count in its content only.
        `named_call`: the client named the function to call.
        """
        self.finish = ""
        self.num_tokens = 0
        self._num_predicted = 0
        """Of them, those that were guessed from the client's prediction."""
        self._generation = generation
        self._text = text
        self._detokenizer = text.detokenizer(generation.prompt_ids, skip_special_tokens=skip_special_tokens)
        self._stop = StopMatcher(stop.strings, include=stop.include)
        self._stop_tokens = text.special_tokens_in(stop.strings) if skip_special_tokens else {}
        self._include_stop = stop.include
        self._machine = machine
        self._called_reason = "stop" if named_call else "tool_calls"
        self._parsed: list[Event] = []
        """Reasoning and calls of the delta that is being read, and the content before them."""
        self._show_ids = ids.show
        self._begun = False
        self._token_name = _id_name if ids.logprobs_by_id else text.token_bytes
        self._unsent = echo
        self._num_chars = len(echo)
        """Of the echo, and detokenised so far, held ones included."""
        self._prompt: PromptScores | None = None
        """Until it is complete."""
        if scores:
            self._prompt = PromptScores(generation.prompt_ids, echo, scores, text, self._token_name)

    def feed(self, delta: Delta) -> list[Event]:
        """What `delta` adds, maybe nothing. Tokens after a stop string are dropped and not counted."""
        logprobs: list[TokenLogprob] = []
        ranks: list[PromptEntry | None] = []
        if self._prompt is not None:
            self._prompt.take(delta.prompt_logprobs)
            if not self._prompt.complete:
                return []
            logprobs, ranks, self._prompt = self._prompt.shown, self._prompt.ranked, None
        self._num_predicted += delta.accepted_prediction
        text, self._unsent = self._unsent, ""
        matched = ""
        last, before = len(delta.ids) - 1, self.num_tokens
        for place, token_id in enumerate(delta.ids):
            if delta.logprobs and (self._machine is None or self._machine.is_content(token_id)):
                logprobs.append(self._logprob(token_id, delta.logprobs[place]))
            self.num_tokens += 1
            if place == last and delta.finish and self._hides(token_id, delta.finish):
                continue
            special = self._stop_tokens.get(token_id)
            if self._machine is not None:
                found = self._machine.push(token_id, self._detokenizer.push(token_id))
                text, matched = self._read(found, text)
                if special is not None and not matched and self._machine.in_content:
                    piece, matched = self._match(special, shown=False)
                    text += piece
            else:
                piece, matched = self._match(special or self._detokenizer.push(token_id), shown=special is None)
                text += piece
            if matched:
                self.finish = "stop"
                break
            if self._machine is not None and self._machine.is_full:
                text += self._stop.flush()
                self.finish = "stop"
                break
        if not self.finish and delta.finish:
            text, matched = self._flush(text, cut=delta.finish == "length")
            self.finish = "stop" if matched else delta.finish
        ids = delta.ids[: self.num_tokens - before] if self._show_ids else ()
        events: list[Event]
        if self._parsed:
            events, self._parsed = self._parsed, []
            if text:
                events.append(Content(text))
            _show_tokens(events, tuple(logprobs), ids)
        else:
            events = [Content(text, tuple(logprobs), ids)] if text or logprobs or ids else []
        if ranks:
            events.insert(0, PromptRanks(tuple(ranks)))
        if self._show_ids and not self._begun:
            events.insert(0, PromptIds(self._generation.prompt_ids))
        self._begun = True
        if self.finish:
            stop_reason = matched or (self._stop_token(delta) if self.finish == "stop" else None)
            events += (ChoiceEnd(self._reason(), stop_reason), self.usage(delta.cached_tokens))
        return events

    @property
    def has_calls(self) -> bool:
        return self._machine is not None and self._machine.num_calls > 0

    def usage(self, cached_tokens: int) -> TokenUsage:
        """What the choice has taken so far."""
        reasoning = 0 if self._machine is None else self._machine.num_reasoning_tokens
        usage = TokenUsage(len(self._generation.prompt_ids), self.num_tokens, cached_tokens, reasoning)
        predicted = self._generation.prediction_ids
        if predicted is None:
            return usage
        accepted = min(self._num_predicted, self.num_tokens)
        return msgspec.structs.replace(
            usage,
            accepted_prediction_tokens=accepted,
            rejected_prediction_tokens=max(0, len(predicted) - accepted),
        )

    def _match(self, text: str, shown: bool = True) -> tuple[str, str]:
        """The text that may be sent, and the stop string that it completed, or "".

        A stop string counts if it is complete at the token that fulfils min_tokens, or later.
        """
        if shown:
            self._num_chars += len(text)
        early = self.num_tokens < self._generation.sampling.min_tokens
        return self._stop.push(text, shown=shown, early=early)

    def _read(self, found: Sequence[FormatEvent], text: str) -> tuple[str, str]:
        """As `_match`, of the content in what the machine found, which follows `text`. What is not content goes to
        `_parsed`, behind the text before it."""
        for event in found:
            if isinstance(event, ContentText):
                piece, matched = self._match(event.text)
                text += piece
                if matched:
                    return text, matched
                continue
            text += self._stop.flush()
            if text:
                self._parsed.append(Content(text))
                text = ""
            self._parsed.append(event)
        return text, ""

    def _reason(self) -> str:
        """An answer that stops with calls asks for their results, unless the client named its call."""
        return self._called_reason if self.has_calls and self.finish == "stop" else self.finish

    def _flush(self, text: str, *, cut: bool) -> tuple[str, str]:
        """The end of what follows `text`, as `_match`; `cut`: the model would have gone on."""
        if self._machine is not None:
            found = self._machine.push(-1, self._detokenizer.flush()) + self._machine.finish(cut=cut)
            text, matched = self._read(found, text)
        else:
            piece, matched = self._match(self._detokenizer.flush())
            text += piece
        return (text, matched) if matched else (text + self._stop.flush(), "")

    def _hides(self, token_id: int, finish: str) -> bool:
        """A token that ended the answer is no part of its text, unless the client asked for what stopped it."""
        stopped = finish == "stop" and token_id in self._generation.sampling.stop_token_ids
        return stopped and not self._include_stop

    def _stop_token(self, delta: Delta) -> int | None:
        """The token that ended the answer, where the client named it and it is no end token of the model."""
        token_id = delta.ids[-1] if delta.ids else -1
        named = token_id in self._generation.sampling.stop_token_ids and token_id not in self._text.eos_ids
        return token_id if named else None

    def _logprob(self, token_id: int, logprob: Logprob) -> TokenLogprob:
        first = self._detokenizer.at_start
        top = tuple((self._token_name(token, first), value) for token, value in logprob.top)
        return TokenLogprob(self._token_name(token_id, first), logprob.logprob, top, self._num_chars)


def _show_tokens(events: list[Event], logprobs: tuple[TokenLogprob, ...], ids: tuple[int, ...]) -> None:
    """Put what a delta's tokens have to show into its first content, which is made where there is none."""
    if not (logprobs or ids):
        return
    for place, event in enumerate(events):
        if isinstance(event, Content):
            events[place] = Content(event.text, logprobs, ids)
            return
    events.insert(0, Content("", logprobs, ids))


def _id_name(token_id: int, first: bool) -> bytes:
    """vLLM's form of a token that is named by its id."""
    return b"token_id:%d" % token_id
