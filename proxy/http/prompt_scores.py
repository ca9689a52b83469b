"""Log probabilities of one prompt's tokens, as they come from the engine, in the forms that an answer shows.

With `echo` they stand before those of the answer, each with the place of its token in the echoed text; vLLM's
`prompt_logprobs` names tokens by id and rank. Knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.node.messages.control import PromptLogprob
from baton.proxy.http.events import PromptEntry, RankedToken, TokenLogprob
from baton.proxy.text.model_text import ModelText

TokenName = Callable[[int, bool], bytes]
"""The bytes that show a token; True: as the first of a text."""


@dataclass(frozen=True, slots=True)
class ScoreRule:
    """What the client wants to see of the prompt: alternatives beside each token, or None for no log probabilities."""

    echo_top: int | None
    ranked_top: int | None

    def __bool__(self) -> bool:
        return self.echo_top is not None or self.ranked_top is not None


NO_SCORES = ScoreRule(None, None)


class PromptScores:
    """Of a prompt that the answer begins with as `echo`."""

    def __init__(
        self, prompt_ids: Sequence[int], echo: str, rule: ScoreRule, text: ModelText, token_name: TokenName
    ) -> None:
        self.shown: list[TokenLogprob] = []
        """For `echo`: of the prompt's tokens in order, the first one included."""
        self.ranked: list[PromptEntry | None] = []
        """For `prompt_logprobs`, in the same order."""
        self._prompt_ids = prompt_ids
        self._echo = echo
        self._rule = rule
        self._text = text
        self._token_name = token_name
        self._detokenizer = text.detokenizer()
        self._num_chars = 0
        """Characters of the echo before the next token."""
        self._num_taken = 0
        self._take(None)

    @property
    def complete(self) -> bool:
        return self._num_taken == len(self._prompt_ids)

    def take(self, entries: Sequence[PromptLogprob]) -> None:
        """Of the next tokens."""
        for entry in entries:
            self._take(entry)

    def _take(self, entry: PromptLogprob | None) -> None:
        """Of the next token; None: the first one, which has none."""
        token_id = self._prompt_ids[self._num_taken]
        self._num_taken += 1
        if self._rule.ranked_top is not None:
            self.ranked.append(None if entry is None else self._ranked(token_id, entry, self._rule.ranked_top))
        if self._rule.echo_top is not None:
            self.shown.append(self._shown(token_id, entry, self._rule.echo_top))

    def _shown(self, token_id: int, entry: PromptLogprob | None, num_top: int) -> TokenLogprob:
        first, offset = self._detokenizer.at_start, self._num_chars
        name = self._token_name(token_id, first)
        piece = self._detokenizer.push(token_id) or self._special(token_id)
        self._num_chars = min(len(self._echo), offset + len(piece))
        if entry is None:
            return TokenLogprob(name, None, (), offset)
        top = tuple((self._token_name(token, first), value) for token, value in entry.top[:num_top])
        return TokenLogprob(name, entry.logprob, top, offset)

    def _special(self, token_id: int) -> str:
        """The text of a special token, where the echo has it: not where the tokenizer added it."""
        text = self._text.special_text(token_id)
        return text if text and self._echo.startswith(text, self._num_chars) else ""

    def _ranked(self, token_id: int, entry: PromptLogprob, num_top: int) -> PromptEntry:
        """The token itself first, as in vLLM; where it is among the likeliest, its place there is its rank."""
        found = {token_id: RankedToken(entry.logprob, entry.rank, self._text.token_bytes(token_id))}
        for rank, (token, value) in enumerate(entry.top[:num_top], 1):
            found[token] = RankedToken(value, rank, self._text.token_bytes(token))
        return found
