"""A Hugging Face model folder's text side: tokenizer, chat template, end tokens, default sampling.

What the folder's files say is read in `model_files`. Uses the `tokenizers` library alone, so that the proxy needs
neither torch nor transformers. Knows no requests.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from baton.node.api_settings import AUTO
from baton.node.errors import BadRequest
from baton.node.telemetry import excerpt
from baton.proxy.formats.markup import Thinking
from baton.proxy.text.detokenize import Decoding, Detokenizer
from baton.proxy.text.effort import effort_variables
from baton.proxy.text.grammar_check import GrammarCheck
from baton.proxy.text.model_files import is_panic, read_model_files
from baton.proxy.text.model_markup import ModelMarkup
from baton.proxy.text.pooling import pooling_of
from baton.proxy.text.renderer import Renderer, TemplateTrial
from baton.proxy.text.template import NEXT_MESSAGE, RenderOptions

INLINE_TEXT_CHARS = 512
"""At most 0.2 ms of tokenising, about what two threads need to hand a text over; longer texts leave the event loop."""
LONG_TEXT_CHARS = 1 << 15
"""Some 20 ms of tokenising; longer texts have threads of their own, so that a burst of them does not delay others."""
MAX_THREADS = 8


class ModelText:
    """The tokenizer of one folder; raises SettingsError where the folder has none, or a broken one."""

    def __init__(
        self,
        folder: Path,
        *,
        chat_template: Path | None = None,
        tool_format: str = AUTO,
        reasoning_format: str = AUTO,
    ) -> None:
        """`chat_template`: a file instead of the folder's. Formats are of TOOL_FORMATS and REASONING_FORMATS
        (node.api_settings)."""
        files = read_model_files(folder, chat_template)
        self._tokenizer = files.tokenizer
        self._info = {**files.special_tokens, "chat_template": files.template or None}
        self._renderer = (
            Renderer(files.template, files.special_tokens, files.tools_template) if files.template else None
        )
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        known_ids = max(vocab.values(), default=-1) + 1
        self.vocab_size = files.table_size or known_ids
        """Rows of the model's table: token ids of a request are below this, whatever the tokenizer knows."""
        self.num_decodable = max(self.vocab_size, known_ids)
        """Token ids that can be asked for as text are below this."""
        self._longest_token_chars = max(map(len, vocab), default=1)
        self.defaults = files.defaults
        self.pooling = pooling_of(folder)
        self.eos_ids = tuple(token for token in files.eos_ids if token < self.vocab_size)
        self.grammars = GrammarCheck(folder / "tokenizer.json", self.vocab_size, self.eos_ids)
        self._added = {token: added for token, added in self._tokenizer.get_added_tokens_decoder().items()}
        self._special_ids = frozenset(token for token, added in self._added.items() if added.special)
        self.markup = ModelMarkup(
            files.template + files.tools_template,
            {str(added.content): token for token, added in self._added.items()},
            self._special_ids,
            lambda text: self.encode(text, add_special_tokens=False),
            tool_format=tool_format,
            reasoning_format=reasoning_format,
        )
        self._byte_level = "ByteLevel" in str(self._tokenizer.decoder)
        self._byte_values = _byte_values(vocab) if "ByteFallback" in str(self._tokenizer.decoder) else {}
        self._inner_pieces: dict[int, bytes] = {}
        """Of tokens that were asked for: what each adds to a text that has begun."""
        self._before = None if self._byte_level else self._token_to_follow(vocab)
        self._decoding = Decoding(self._decode_all, self._special_ids, self._byte_values, self.token_bytes)
        self._decoding_of_all = dataclasses.replace(self._decoding, skipped=frozenset())
        threads = max(2, min(MAX_THREADS, len(os.sched_getaffinity(0)) // 2))
        self._encoders = ThreadPoolExecutor(threads, "tokenize")
        self._long_encoders = ThreadPoolExecutor(threads // 2, "tokenize-long")
        self._begins_reasoning: bool | None = None
        """Whether prompts do so where they are asked to; None while it is not known."""

    def start(self) -> None:
        """Prepare the chat template and the check of grammars in the background, on the event loop's thread; a folder
        with a bad template still serves completions."""
        self.grammars.start()
        if self._renderer is not None:
            self._renderer.start()

    def render(self, messages: Sequence[Mapping[str, Any]], options: RenderOptions = NEXT_MESSAGE) -> str:
        """The prompt of a chat; special tokens are in it already. BadRequest where the model cannot chat."""
        return self._chat_renderer().render(messages, self._with_effort(options))

    async def render_bounded(self, messages: Sequence[Mapping[str, Any]], options: RenderOptions) -> str:
        """As `render`, off the event loop; Overloaded where the conversations before it take too long."""
        return await self._chat_renderer().render_bounded(messages, self._with_effort(options))

    def _with_effort(self, options: RenderOptions) -> RenderOptions:
        """Raises BadRequest where the model cannot be asked for it."""
        if not options.effort:
            return options
        known, reasons = self._chat_renderer().variables, self.markup.has_reasoning
        found = effort_variables(options.effort, known, reasons=reasons, param=options.effort_param)
        return dataclasses.replace(options, variables={**found, **options.variables})

    @property
    def ignores_tools(self) -> bool:
        """The chat template does not show tools; known once a conversation was rendered."""
        return self._trial is not None and self._trial.ignores_tools

    @property
    def _trial(self) -> TemplateTrial | None:
        return None if self._renderer is None else self._renderer.trial

    def _chat_renderer(self) -> Renderer:
        if self._renderer is None:
            raise BadRequest(
                "this model has no chat template, so it cannot answer /v1/chat/completions; use /v1/completions",
                code="no_chat_template",
            )
        return self._renderer

    def thinking(self, prompt_ids: Sequence[int]) -> Thinking:
        """Whether the answer to a chat's prompt begins inside reasoning. A model whose prompts begin reasoning where
        they are asked to does not begin it itself."""
        found = self.markup.thinking(prompt_ids)
        if found is not Thinking.UNKNOWN:
            return found
        if self._begins_reasoning is None and self._trial is not None:
            ids = self.encode(self._trial.with_reasoning, add_special_tokens=False)
            self._begins_reasoning = self.markup.thinking(ids) is Thinking.OPEN
        return Thinking.CLOSED if self._begins_reasoning else found

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Token ids of `text`; `add_special_tokens` adds what the tokenizer puts around a text, mostly a first one."""
        return self._ids_of([text], add_special_tokens)[0]

    async def encode_bounded(
        self, text: str, *, add_special_tokens: bool, max_tokens: int, param: str
    ) -> tuple[int, ...]:
        """As `encode`, off the event loop where `text` is long; BadRequest, before any work, if it cannot fit."""
        if len(text) > max_tokens * self._longest_token_chars:
            fewest = len(text) // self._longest_token_chars
            raise BadRequest(
                f"This model's maximum context length is {max_tokens} tokens. Your prompt of {len(text)} characters "
                f"has more than {fewest} tokens.",
                param=param,
                code="context_length_exceeded",
            )
        if len(text) <= INLINE_TEXT_CHARS:
            return self.encode(text, add_special_tokens=add_special_tokens)
        threads = self._long_encoders if len(text) > LONG_TEXT_CHARS else self._encoders
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(threads, lambda: self.encode(text, add_special_tokens=add_special_tokens))

    async def ids_of_words(self, words: Sequence[str]) -> list[list[tuple[int, ...]]]:
        """Of each word the token ids of a text that begins with it, and of one that continues with it after a space."""

        def encode() -> list[list[tuple[int, ...]]]:
            plain = [word.lstrip(" ") or word for word in words]
            forms = [form for word in plain for form in (word, f" {word}")]
            ids = self._ids_of(forms, add_special_tokens=False)
            return [sorted({*ids[place : place + 2]} - {()}) for place in range(0, len(ids), 2)]

        return await asyncio.get_running_loop().run_in_executor(self._long_encoders, encode)

    def _ids_of(self, texts: list[str], add_special_tokens: bool) -> list[tuple[int, ...]]:
        try:
            # encode_batch_fast is encode without character offsets: half the time and memory of a long text.
            found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        except BaseException as error:
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            raise BadRequest(f"the model's tokenizer cannot process this text: {excerpt(error, 80)}") from None
        return [tuple(encoding.ids) for encoding in found]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def detokenizer(self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True) -> Detokenizer:
        """A new one, for the stream of tokens that follows `prompt_ids`."""
        return Detokenizer(self._decoding if skip_special_tokens else self._decoding_of_all, prompt_ids)

    def special_tokens_in(self, strings: Sequence[str]) -> dict[int, str]:
        """Special tokens whose text is part of one of `strings`; they are no part of an answer's text."""
        if not strings:
            return {}
        texts = ((token, str(self._added[token].content)) for token in self._special_ids)
        return {token: text for token, text in texts if any(text in string for string in strings)}

    def special_text(self, token_id: int) -> str:
        """The text of a special token; empty for other tokens."""
        return str(self._added[token_id].content) if token_id in self._special_ids else ""

    def token_bytes(self, token_id: int, first: bool = False) -> bytes:
        """The bytes that one token stands for, exact also where they are a part of a character; empty if unknown.

        `first`: as the first token of a text, which many tokenizers give no leading space.
        """
        if token_id in self._special_ids or (self._byte_level and token_id in self._added):
            return str(self._added[token_id].content).encode()
        if self._byte_level:
            piece = self._tokenizer.id_to_token(token_id) or ""
            return b"".join(_BYTES_OF.get(char, char.encode()) for char in piece)
        if token_id in self._byte_values:
            return self._byte_values[token_id]
        if first:
            return self._decode_all([token_id]).encode()
        known = self._inner_pieces.get(token_id)
        if known is None:
            known = self._inner_pieces[token_id] = self._inner_piece(token_id).encode()
        return known

    def _inner_piece(self, token_id: int) -> str:
        if self._before is None:
            return (self._tokenizer.id_to_token(token_id) or "").replace("\u2581", " ")
        return self._decode_all([self._before, token_id])[len(self._decode_all([self._before])) :]

    def _token_to_follow(self, vocab: Mapping[str, int]) -> int | None:
        """A token whose text stays as it is, whatever follows; None where the tokenizer has none."""
        for token_id in sorted(vocab.values()):
            text = "" if token_id in self._added else self._decode_all([token_id])
            if text.isalnum() and self._decode_all([token_id, token_id]).startswith(text):
                return token_id
        return None

    def _decode_all(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def info(self) -> dict[str, str | None]:
        """The texts of the named special tokens and the chat template, under transformers' names."""
        return {"bos_token": None, "eos_token": None, "pad_token": None, **self._info}

    def close(self) -> None:
        for threads in (self._encoders, self._long_encoders):
            threads.shutdown(wait=False, cancel_futures=True)
        self.grammars.close()
        if self._renderer is not None:
            self._renderer.close()


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's printable stand-in for each byte (openai/gpt-2, src/encoder.py, bytes_to_unicode), inverted."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    codes = {byte: byte for byte in printable} | {byte: 256 + rank for rank, byte in enumerate(others)}
    return {chr(code): bytes([byte]) for byte, code in codes.items()}


_BYTES_OF = _byte_alphabet()


def _byte_values(vocab: Mapping[str, int]) -> dict[int, bytes]:
    """The byte tokens of a vocabulary, written `<0x0A>`."""
    found = ((token_id, re.fullmatch("<0x([0-9A-Fa-f]{2})>", piece)) for piece, token_id in vocab.items())
    return {token_id: bytes.fromhex(match[1]) for token_id, match in found if match}
