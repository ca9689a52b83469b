"""How much longer a tokenizer's rules may make a text: a short prompt that becomes gigabytes ends the proxy.

Rules replace pieces of a text before it is cut into tokens (normalizers) or after tokens are joined (decoders). Their
worst growth follows from their lengths, so that a hostile tokenizer.json is refused before any text. Knows no file.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordPiece

from baton.node.errors import SettingsError

MAX_GROWTH = 256
"""Characters that one may become. Eight patterns that insert a character have this; the usual tokenizers have 2."""
MAX_TOKEN_CHARS = 1 << 14
MAX_WORD_CHARS = 1 << 12
"""Of a word that WordPiece cuts, which takes the square of its length."""


def check_growth(where: object, tokenizer: Tokenizer) -> None:
    """Raises SettingsError if a text could grow, or take time, without a bound that suits a server."""
    for name, part in (("normalizer", tokenizer.normalizer), ("decoder", tokenizer.decoder)):
        if part is not None and _growth(json.loads(part.__getstate__())) > MAX_GROWTH:
            raise SettingsError(f"{where}: the {name} can make a text more than {MAX_GROWTH} times as long")
    longest = max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=0)
    if longest > MAX_TOKEN_CHARS:
        raise SettingsError(f"{where}: a token has {longest} characters, more than {MAX_TOKEN_CHARS}")
    model = tokenizer.model
    if isinstance(model, WordPiece) and model.max_input_chars_per_word > MAX_WORD_CHARS:
        raise SettingsError(f"{where}: max_input_chars_per_word is above {MAX_WORD_CHARS}")


def _growth(rule: Mapping[str, Any]) -> float:
    """Characters that one may become by this rule; of a sequence the product."""
    match rule:
        case {"normalizers": list(rules)} | {"decoders": list(rules)}:
            return math.prod(map(_growth, rules))
        case {"pattern": {"String": str(text)}, "content": str(content)} if text:
            return max(1.0, len(content) / len(text))
        case {"pattern": _, "content": str(content)} | {"prepend": str(content)}:
            return 1.0 + len(content)  # a pattern may match between two characters
        case {"precompiled_charsmap": str(encoded)}:
            return max(1.0, _longest_mapping(base64.b64decode(encoded)))
    return 1.0


def _longest_mapping(charsmap: bytes) -> int:
    """Bytes of the longest text in a SentencePiece map: a trie with its size before it, then texts that end with 0."""
    trie_bytes = int.from_bytes(charsmap[:4], "little")
    return max(map(len, charsmap[4 + trie_bytes :].split(b"\0")))
