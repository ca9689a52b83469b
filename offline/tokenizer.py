"""The tokenizer that a program gets from `LLM.get_tokenizer`: the proxy's own, under the names of transformers.

So a text has here the ids that the server gives it. Knows no requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from baton.proxy.text.model_files import SamplingDefaults
from baton.proxy.text.model_text import ModelText


class OfflineTokenizer:
    """The tokenizer and the chat template of one model folder. Raises SettingsError where it has no tokenizer."""

    def __init__(self, folder: Path, chat_template: Path | None = None) -> None:
        """`chat_template`: a file instead of the folder's."""
        self._text = ModelText(folder, chat_template=chat_template)

    @property
    def vocab_size(self) -> int:
        return self._text.vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return self._text.eos_ids

    @property
    def defaults(self) -> SamplingDefaults:
        """What the model's generation_config.json recommends."""
        return self._text.defaults

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self._text.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self._text.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def decode_token(self, token_id: int) -> str:
        """The text of one token; U+FFFD for a part of a character."""
        return self._text.token_bytes(token_id).decode(errors="replace")

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], tokenize: bool = True) -> str | list[int]:
        """The prompt that asks for the next message of a conversation, as text or token ids.

        Raises BadRequest where the model has no chat template, or where that refuses the messages.
        """
        prompt = self._text.render(messages)
        return self.encode(prompt, add_special_tokens=False) if tokenize else prompt
