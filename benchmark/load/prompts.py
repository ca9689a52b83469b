"""The tokens or words of a part of a prompt: random, equal for equal key and salt.

Ids are drawn below `vocab_size`, by default a bound that every vocabulary exceeds. Words are short English ones; with
the model's tokenizer only those that are one token each, so that a text's length in tokens is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from baton.benchmark.load.plan import Part
from baton.node.errors import SettingsError
from baton.node.modelhub import locate_model

FIRST_ID = 300
"""Below it are special tokens and single bytes."""
MIN_WORDS = 16
_TEXT = """
the and a to of in that was he she it his her with for they had on as but at him said all so one not were then be is
out them up by my have from this when will you little day old man king tree house went came saw big down very into there
who what could would again good great long way time home water boy girl dog cat bird red sun night door hand eyes back
two three some more other where here never now only first last over away before after like about must know see go come
make take give tell find look think play run sing eat sleep work help want
"""
WORDS = tuple(_TEXT.split())


class PartSource(Protocol):
    """What can be made of a part."""

    def ids(self, part: Part) -> list[int]:
        """As many ids as the part has tokens."""
        ...

    def text(self, part: Part) -> str:
        """Text that begins with a space; as many words as the part has tokens."""
        ...


class RandomParts:
    """Random ids and words, drawn from a part's key and the salt of the run."""

    def __init__(self, salt: int, vocab_size: int, words: Sequence[str] = WORDS) -> None:
        if vocab_size <= FIRST_ID:
            raise SettingsError(f"--vocab-size {vocab_size}: more than {FIRST_ID} are needed")
        self._salt = salt
        self._vocab_size = vocab_size
        self._words = words

    def ids(self, part: Part) -> list[int]:
        return [int(i) for i in self._random(part).integers(FIRST_ID, self._vocab_size, part.num_tokens).tolist()]

    def text(self, part: Part) -> str:
        chosen = self._random(part).integers(0, len(self._words), part.num_tokens)
        return "".join(f" {self._words[i]}" for i in chosen.tolist())

    def _random(self, part: Part) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self._salt, *part.key]))


def words_of(model: str) -> list[str]:
    """The words that are one token each, behind a space, in the tokenizer of `model` (as node.modelhub names models).

    Raises SettingsError where there is no tokenizer.json, or too few such words to make text of.
    """
    path = locate_model(model) / "tokenizer.json"
    if not path.is_file():
        raise SettingsError(f"--tokenizer {model}: there is no {path.name}")
    tokenizer = Tokenizer.from_file(str(path))
    # Two in a row, so that a tokenizer which puts a space in front of a text does not count as one.
    found = [word for word in WORDS if len(tokenizer.encode(f" {word} {word}", add_special_tokens=False).ids) == 2]
    if len(found) < MIN_WORDS:
        raise SettingsError(f"--tokenizer {model}: only {len(found)} common English words are one token each")
    return found
