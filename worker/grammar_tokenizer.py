"""llguidance's own form of a model's tokenizer: loaded once, at the start of a worker.

The load takes one to three seconds for a large vocabulary, and the library keeps Python's other threads from running
meanwhile; a worker that serves would be taken for dead. It takes some 160 MB for 128,000 tokens. Knows no grammars.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llguidance import LLTokenizer

from baton.node.model_folder import MAX_TOKENIZER_BYTES, read_file

_INSIDE = r'[^"\\\x00-\x1F\x7F]'
"""A character of a JSON string that is written as it is."""
SLICES = (
    r"[\x20\x0A\x0D\x09]+",
    *(f"{_INSIDE}{{1,{most}}}" for most in (3, 6, 10, 16, 30)),
    f"{_INSIDE}+",
    r"[ !#-\[\]-~]{1,10}",
    r"[A-Za-z0-9_\-]{1,10}",
    "[a-z]{1,10}",
)
"""Kinds of tokens that are allowed together: where all strings of such a form may come next, the library takes the
tokens of this form into a mask without reading each. Those of the lengths are for strings with a longest one."""


@dataclass(frozen=True, slots=True)
class GrammarTokenizer:
    """The tokens of a model, as a grammar sees them."""

    tokens: LLTokenizer
    end_id: int
    """The token that stands for all those that end a text."""


def load_grammar_tokenizer(path: Path, vocab_size: int, end_ids: Sequence[int]) -> GrammarTokenizer:
    """`end_ids`: of the model's configuration. The first stands for the end; where there is none, token 0."""
    end_id = end_ids[0] if end_ids else 0
    text = read_file(path, MAX_TOKENIZER_BYTES).decode()
    return GrammarTokenizer(LLTokenizer(text, vocab_size, [end_id], list(SLICES)), end_id)


@contextmanager
def loading_grammar_tokenizer(
    path: Path, vocab_size: int, end_ids: Sequence[int]
) -> Iterator[Future[GrammarTokenizer]]:
    """Loads beside what is done inside the block, and is done at its end. Without the file each grammar fails."""
    with ThreadPoolExecutor(1, "grammar-tokenizer") as thread:
        yield thread.submit(load_grammar_tokenizer, path, vocab_size, end_ids)
