"""A Hugging Face model folder's text side: tokenizer, chat template, end tokens, default sampling.

Reads `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`, `generation_config.json` and `config.json`
with the `tokenizers` library alone, so that the proxy needs neither torch nor transformers. Knows no requests.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from baton.node.errors import BadRequest, SettingsError
from baton.proxy.text.detokenize import Decoding, Detokenizer
from baton.proxy.text.template import ChatTemplate

LONG_TEXT_CHARS = 8192
"""About 4 ms of tokenising; longer texts leave the event loop."""

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What the model's `generation_config.json` recommends where a client says nothing; OpenAI's values elsewhere."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class ModelText:
    """The tokenizer of one folder; raises SettingsError where the folder has none, or a broken one."""

    def __init__(self, folder: Path) -> None:
        config = _read_json(folder / "config.json")
        generation = _read_json(folder / "generation_config.json")
        names = _read_json(folder / "tokenizer_config.json")
        self._tokenizer = _read_tokenizer(folder / "tokenizer.json")
        special = {key: _token_name(names.get(key)) for key in _SPECIAL_NAMES}
        source = _template_source(folder, names)
        self._template = ChatTemplate(source, {k: v for k, v in special.items() if v}) if source else None
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        known_ids = max(vocab.values(), default=-1) + 1
        self.vocab_size = _count(config, "vocab_size") or known_ids
        """Rows of the model's table: token ids of a request are below this, whatever the tokenizer knows."""
        self.num_decodable = max(self.vocab_size, known_ids)
        """Token ids that can be asked for as text are below this."""
        self._longest_token_chars = max(map(len, vocab), default=1)
        self.defaults = _sampling_defaults(generation)
        eos = _ids(generation.get("eos_token_id")) + _ids(config.get("eos_token_id"))
        eos += _ids(vocab.get(special["eos_token"]))
        self.eos_ids = tuple(sorted({token for token in eos if token < self.vocab_size}))
        self._added = {token: added for token, added in self._tokenizer.get_added_tokens_decoder().items()}
        self._special_ids = frozenset(token for token, added in self._added.items() if added.special)
        self._byte_level = "ByteLevel" in str(self._tokenizer.decoder)
        self._byte_values = _byte_values(vocab) if "ByteFallback" in str(self._tokenizer.decoder) else {}
        self._inner_pieces: dict[int, bytes] = {}
        """Of tokens that were asked for: what each adds to a text that has begun."""
        self._before = None if self._byte_level else self._token_to_follow(vocab)
        self._decoding = Decoding(self._decode_all, self._special_ids, self._byte_values, self.token_bytes)
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt of a chat; special tokens are in it already. BadRequest where the model cannot chat."""
        if self._template is None:
            raise BadRequest(
                "this model has no chat template, so it cannot answer /v1/chat/completions; use /v1/completions",
                code="no_chat_template",
            )
        return self._template.render(messages)

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Token ids of `text`; `add_special_tokens` adds what the tokenizer puts around a text, mostly a first one."""
        # encode_batch_fast is encode without character offsets: half the time and memory of a long text.
        return tuple(self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

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
        if len(text) <= LONG_TEXT_CHARS:
            return self.encode(text, add_special_tokens=add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._threads, lambda: self.encode(text, add_special_tokens=add_special_tokens)
        )

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def detokenizer(self, prompt_ids: Sequence[int] = ()) -> Detokenizer:
        """A new one, for the stream of tokens that follows `prompt_ids`."""
        return Detokenizer(self._decoding, prompt_ids)

    def special_tokens_in(self, strings: Sequence[str]) -> dict[int, str]:
        """Special tokens whose text is part of one of `strings`; they are no part of an answer's text."""
        if not strings:
            return {}
        texts = ((token, str(self._added[token].content)) for token in self._special_ids)
        return {token: text for token, text in texts if any(text in string for string in strings)}

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

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


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


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise SettingsError(f"no {path.name} in {path.parent}: a tokenizer in Hugging Face's fast format is needed")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every fault of the file
        raise SettingsError(f"{path} is not a tokenizer: {str(error)[:300]}") from None
    tokenizer.no_truncation()  # files of training runs carry a truncation that would silently cut prompts
    tokenizer.no_padding()
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, empty where there is no such file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"{path} cannot be read: {str(error)[:300]}") from None
    if not isinstance(value, dict):
        raise SettingsError(f"{path} holds no JSON object")
    return value


def _template_source(folder: Path, names: Mapping[str, Any]) -> str:
    """The chat template's source, empty where there is none; a file of its own wins, as in transformers."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise SettingsError(f"{path} cannot be read: {error}") from None
    source = names.get("chat_template")
    if isinstance(source, list):  # several named ones
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if source is not None and not isinstance(source, str):
        raise SettingsError(f"chat_template in {folder / 'tokenizer_config.json'} is no text")
    return source or ""


def _token_name(value: object) -> str:
    """A special token stands in the file as its text or as {"content": text, ...}."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [entry for entry in values if isinstance(entry, int) and not isinstance(entry, bool) and entry >= 0]


def _count(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key, 0)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _sampling_defaults(generation: Mapping[str, Any]) -> SamplingDefaults:
    """Values that are no number, or out of the range that a request may have, are as if not there."""

    def number(key: str, low: float, high: float, otherwise: float) -> float:
        value = generation.get(key)
        usable = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        return float(value) if usable and value is not None else otherwise

    return SamplingDefaults(
        temperature=number("temperature", 0.0, 100.0, 1.0),
        top_p=number("top_p", 1e-9, 1.0, 1.0),
        top_k=int(number("top_k", 0, 1 << 30, 0)),
        min_p=number("min_p", 0.0, 1.0, 0.0),
        repetition_penalty=number("repetition_penalty", 1e-9, 100.0, 1.0),
    )
