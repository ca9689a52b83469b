"""Token ids to text, one token at a time, such that the pieces joined are the text of all tokens at once.

Two facts make this more than `decode([token])`: a character may be spread over several tokens, and decoders treat the
first token of a text specially (a leading space is stripped). So a window of recent tokens is decoded with and
without the new ones, and their difference is the new text (the scheme of Hugging Face's text-generation-inference).
`tokenizers.decoders.DecodeStream` does the same, but has no way to hand out what is left at the end, and raises on
token sequences that are no valid UTF-8, which a model may well produce.
"""

from __future__ import annotations

from collections.abc import Callable

_REPLACEMENT = "\ufffd"
_MAX_HELD_TOKENS = 32
"""A character has at most 4 bytes, so a longer wait means bytes that will never be one."""


class Detokenizer:
    """The text of one stream of tokens."""

    def __init__(self, decode: Callable[[list[int]], str], skipped: frozenset[int]) -> None:
        self._decode = decode
        self._skipped = skipped
        """Special tokens: they have no text, and must not count as the first token of a text either."""
        self._window: list[int] = []
        self._read = 0
        """Tokens of the window whose text is out; the rest is held."""
        self._read_text_chars = 0
        """Characters that those tokens make when decoded alone."""

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, often empty; never a part of a character."""
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT) and len(self._window) - self._read < _MAX_HELD_TOKENS:
            return ""
        if text.endswith(_REPLACEMENT):
            return self._force(text)
        return self._advance(text, keep=self._read)

    def flush(self) -> str:
        """The text still held, at the end of the stream: an unfinished character is U+FFFD."""
        return self._advance(self._decode(self._window), keep=len(self._window)) if self._window else ""

    def _advance(self, text: str, keep: int) -> str:
        """Hand out all of `text`; the window's first `keep` tokens have served as context and go."""
        new = text[self._read_text_chars :]
        self._window = self._window[keep:]
        self._read = len(self._window)
        self._read_text_chars = len(self._decode(self._window)) if self._window else 0
        return new

    def _force(self, text: str) -> str:
        """Hand out what cannot change any more of bytes that are no text, so that the window stays short.

        A cut is clean where both sides decoded alone make the whole. Of any three token borders of a byte-level
        tokenizer one is, as an unfinished character has at most three bytes.
        """
        for cut in range(len(self._window) - 1, len(self._window) - 4, -1):
            head, tail = self._decode(self._window[:cut]), self._decode(self._window[cut:])
            if head + tail == text:
                new = head[self._read_text_chars :]
                self._window, self._read, self._read_text_chars = self._window[cut:], 0, 0
                return new
        return self._advance(text, keep=self._read)
