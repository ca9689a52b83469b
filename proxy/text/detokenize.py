"""Token ids to text, one token at a time, such that the pieces joined are the text of all tokens at once.

Two facts make this more than `decode([token])`: a character may be spread over several tokens, and decoders treat the
first token of a text specially (a leading space is stripped). So a window of recent tokens is decoded with and
without the new ones, and their difference is the new text (the scheme of Hugging Face's text-generation-inference).
The window begins with the last tokens of the prompt, as an answer's first token is not the first of its text.
`tokenizers.decoders.DecodeStream` does the same, but has no way to hand out what is left at the end, and raises on
token sequences that are no valid UTF-8, which a model may well produce.

Tokens that are one byte each (byte fallback) are put together here: the library makes of n bytes that are no character
n times U+FFFD, and only knows so when the last of them is there.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

_REPLACEMENT = "\ufffd"
_MAX_HELD_TOKENS = 32
"""A character has at most 4 bytes, so a longer wait means bytes that will never be one."""
_CONTEXT_TOKENS = 6
"""Of the prompt, or of a run of byte tokens; one would do, unless a decoder looks further back."""
_SEARCHED_TOKENS = 64
"""How far back context is looked for among special tokens."""
_utf8 = codecs.getincrementaldecoder("utf-8")


@dataclass(frozen=True, slots=True)
class Decoding:
    """What detokenising needs of a tokenizer."""

    decode: Callable[[list[int]], str]
    """Special tokens included."""
    skipped: frozenset[int]
    """Special tokens: they have no text, and must not count as the first token of a text either."""
    byte_values: Mapping[int, bytes]
    """The byte of each token of a byte-fallback tokenizer that stands for one; empty for other tokenizers."""
    bytes_of: Callable[[int], bytes]
    """The bytes that one token stands for."""
    chars_alone: dict[int, int] = field(default_factory=dict)
    """Characters of tokens that were decoded alone, which each token's follower asks for; at most the vocabulary's."""


class Detokenizer:
    """The text of one stream of tokens, which follows `prompt_ids`."""

    def __init__(self, decoding: Decoding, prompt_ids: Sequence[int] = ()) -> None:
        self._decode = decoding.decode
        self._skipped = decoding.skipped
        self._byte_values = decoding.byte_values
        self._chars_alone = decoding.chars_alone
        self._bytes = _utf8("replace")
        """Holds byte tokens that are no character yet."""
        recent = [token for token in prompt_ids[-_SEARCHED_TOKENS:] if token not in self._skipped]
        self._window = recent[-_CONTEXT_TOKENS:]
        self._read = len(self._window)
        """Tokens of the window whose text is out; the rest is held."""
        self._read_text_chars = self._text_chars()
        """Characters that those tokens make when decoded alone."""
        if self._window and self._is_cut(decoding.bytes_of):  # the answer may complete the prompt's last character
            self._read_text_chars -= 0 if self._byte_values else 1
        else:
            self._bytes.reset()

    @property
    def at_start(self) -> bool:
        """No token with a text came yet, neither in the prompt nor after it."""
        return not self._window

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, often empty; never a part of a character."""
        if token_id in self._skipped:
            return ""
        if self._byte_values:
            return self._push_with_bytes(token_id)
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT) and len(self._window) - self._read < _MAX_HELD_TOKENS:
            return ""
        if text.endswith(_REPLACEMENT):
            return self._force(text)
        return self._advance(text, keep=self._read)

    def flush(self) -> str:
        """The text still held, at the end of the stream: an unfinished character is U+FFFD."""
        if self._byte_values:
            return self._bytes.decode(b"", True)
        return self._advance(self._decode(self._window), keep=len(self._window)) if self._held else ""

    @property
    def _held(self) -> int:
        return len(self._window) - self._read

    def _push_with_bytes(self, token_id: int) -> str:
        """As `push`; nothing but bytes is ever held, and those not in the window."""
        byte = self._byte_values.get(token_id)
        if byte is not None:
            self._window = [*self._window[1 - _CONTEXT_TOKENS :], token_id]
            self._read = len(self._window)
            self._read_text_chars = -1
            return self._bytes.decode(byte)
        if self._read_text_chars < 0:
            self._read_text_chars = self._text_chars()
        self._window.append(token_id)
        unfinished = self._bytes.decode(b"", True)
        return unfinished + self._advance(self._decode(self._window), keep=self._read)

    def _is_cut(self, bytes_of: Callable[[int], bytes]) -> bool:
        """The window ends within a character; `_bytes` then holds its first bytes."""
        self._bytes.decode(b"".join(map(bytes_of, self._window)))
        return self._bytes.getstate()[0] != b""

    def _text_chars(self) -> int:
        if len(self._window) != 1:
            return len(self._decode(self._window)) if self._window else 0
        (token_id,) = self._window
        known = self._chars_alone.get(token_id)
        if known is None:
            known = self._chars_alone[token_id] = len(self._decode(self._window))
        return known

    def _advance(self, text: str, keep: int) -> str:
        """Hand out all of `text`; the window's first `keep` tokens have served as context and go."""
        new = text[self._read_text_chars :]
        self._window = self._window[keep:]
        self._read = len(self._window)
        self._read_text_chars = self._text_chars()
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
