"""Grammars by llguidance: compiled on threads of their own, and the masks of what sequences may draw next.

    grammars.compile(grammar)            # at once a Constraint, or None: a GrammarCompiled follows
    constraint.advance(token_ids)        # what was drawn
    grammars.masks([constraint, ...])    # for Launched.complete

It knows no sequence, no queue and no step.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask_par

from baton.node.messages.control import Grammar
from baton.worker.constraint import Constraint, GrammarCompiled

COMPILE_THREADS = 2
MASK_THREADS = max(1, min(16, len(os.sched_getaffinity(0)) - 2))
"""A string with a bounded length takes a thread up to a millisecond a row and step, others some 20 microseconds."""
MAX_COMPILED = 256
"""Of grammars; the one that was used least recently is forgotten first."""
ALL_TOKENS = -1
"""A word of a mask with all bits."""

LIBRARY = "llguidance/" + ".".join(version("llguidance").split(".")[:2])
"""Two workers with this in common compute the same masks from the same text."""


class GrammarCompiler:
    """Compiles grammars over one tokenizer, which it reads when the first comes. One thread makes all calls;
    `on_compiled` is called from others."""

    def __init__(self, tokenizer: Path, vocab_size: int, on_compiled: Callable[[GrammarCompiled], None]) -> None:
        self._tokenizer_file = tokenizer
        self._vocab_size = vocab_size
        self._on_compiled = on_compiled
        self._lock = threading.Lock()  # of what the compiling threads write
        self._compiled: OrderedDict[Grammar, LLMatcher | None] = OrderedDict()  # None: it is being compiled
        self._tokenizer_lock = threading.Lock()
        self._tokenizers: dict[tuple[int, ...], LLTokenizer] = {}
        self._threads = ThreadPoolExecutor(COMPILE_THREADS, thread_name_prefix="grammar")
        self._executor: LLExecutor | None = None

    def compile(self, grammar: Grammar) -> Constraint | None:
        """The constraint of a sequence without tokens; None if GrammarCompiled will say when to ask again."""
        with self._lock:
            known = grammar in self._compiled
            matcher = self._compiled.setdefault(grammar, None)
            self._compiled.move_to_end(grammar)
            while len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        if not known:
            self._threads.submit(self._compile, grammar)
        return Constraint(grammar, matcher.deep_copy()) if matcher is not None else None

    def masks(self, constraints: Sequence[Constraint]) -> np.ndarray:
        """What each allows next, int32 [constraints, ceil(vocabulary / 32)], as models.batch.Launched takes them."""
        masks = np.zeros((len(constraints), -(-self._vocab_size // 32)), dtype=np.int32)
        filled: list[Any] = [(each.matcher, row) for row, each in enumerate(constraints) if each.matcher is not None]
        if filled:
            if self._executor is None:
                self._executor = LLExecutor(MASK_THREADS)
            fill_next_token_bitmask_par(self._executor, filled, masks)
        for row, each in enumerate(constraints):
            if each.is_free:
                masks[row] = ALL_TOKENS
            for token_id in each.listed:
                masks[row, token_id // 32] |= np.left_shift(np.int32(1), np.int32(token_id % 32))
        return masks

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    # -- compiling threads

    def _compile(self, grammar: Grammar) -> None:
        try:
            matcher = LLMatcher(self._tokenizer(grammar.end_ids), grammar.text, limits=LLParserLimits(), log_level=0)
            error = matcher.get_error() if matcher.is_error() else ""
        except Exception as failure:  # of the library: the request fails, not the worker
            error = f"{type(failure).__name__}: {failure}"
        with self._lock:
            if error:
                self._compiled.pop(grammar, None)
            elif grammar in self._compiled:
                self._compiled[grammar] = matcher
        self._on_compiled(GrammarCompiled(grammar, error))

    def _tokenizer(self, end_ids: tuple[int, ...]) -> LLTokenizer:
        with self._tokenizer_lock:
            if end_ids not in self._tokenizers:
                text = self._tokenizer_file.read_text(encoding="utf-8")
                self._tokenizers = {end_ids: LLTokenizer(text, n_vocab=self._vocab_size, eos_token=list(end_ids))}
            return self._tokenizers[end_ids]
