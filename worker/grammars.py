"""Grammars by llguidance: compiled on threads of their own, and the masks of what sequences may draw next.

    grammars.compile(grammar)            # at once a Constraint, or None: a GrammarCompiled follows
    grammars.constraint(event)           # after each of these; None: another follows
    constraint.advance(token_ids)        # what was drawn
    grammars.masks([constraint, ...], [drafts, ...])    # for Launched.complete

Copies of one matcher share its lexer, which one thread uses at a time. So sequences of one grammar get matchers that
were compiled apart, as long as there are fewer of these than threads that make masks. This module knows no sequence,
no queue and no step.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from time import thread_time
from typing import Any
from weakref import WeakSet

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits
from llguidance.numpy import fill_next_token_bitmask_par, fill_next_token_bitmask_par_with_draft_tokens

from baton.node.counters import GrammarCounters
from baton.node.messages.control import Grammar
from baton.worker.constraint import AS_MASKED, Allowed, Constraint, GrammarCompiled
from baton.worker.grammar_tokenizer import GrammarTokenizer

COMPILE_THREADS = 2
MASK_THREADS = max(1, min(16, len(os.sched_getaffinity(0)) - 2))
"""A string with a bounded length takes a thread up to a millisecond a row and step, others some 20 microseconds."""
MAX_COMPILED = 256
"""Matchers, of all grammars; those of the grammar that was used least recently are forgotten first."""
COMPILE_S = 0.05
"""A grammar is compiled no more often than fits into this time on one thread: it holds up those behind it."""
ALL_TOKENS = -1
"""A word of a mask with all bits."""

LIBRARY = "llguidance/" + ".".join(version("llguidance").split(".")[:2])
"""Two workers with this in common compute the same masks from the same text."""


def _bit(token_id: int) -> np.int32:
    """Of a token in its word of a mask."""
    return np.left_shift(np.int32(1), np.int32(token_id % 32))


@dataclass(slots=True)
class _Original:
    """A compiled matcher, and what has copies of it."""

    matcher: LLMatcher
    number: int
    copies: WeakSet[Constraint] = field(default_factory=WeakSet)


@dataclass(slots=True)
class _CompiledGrammar:
    """The matchers of one grammar."""

    most: int
    """So many are worth their time."""
    originals: list[_Original] = field(default_factory=list)
    num_pending: int = 0
    """Being compiled."""

    @property
    def size(self) -> int:
        return len(self.originals) + self.num_pending

    @property
    def lacks_one(self) -> bool:
        """Another sequence would be worth another matcher."""
        return self.size < self.most and all(each.copies for each in self.originals)

    def least_used(self) -> _Original | None:
        """None: one that nothing uses will be there soon."""
        found = min(self.originals, key=lambda each: len(each.copies), default=None)
        return None if found is None or (found.copies and self.num_pending) else found


@dataclass(slots=True)
class _MaskedPart:
    """The masks of one constraint among those of a step."""

    constraint: Constraint
    first: int
    end: int
    along: list[Allowed]
    """One a place; the matcher fills the masks of those that follow text of its own one behind the other."""
    base: int
    """The last place that follows none."""
    text: list[int]
    """Drafts that the matcher takes behind it."""

    @classmethod
    def of(cls, constraint: Constraint, drafts: Sequence[int], first: int) -> _MaskedPart:
        along = constraint.along(drafts)
        if not drafts:
            return cls(constraint, first, first + 1, along, 0, [])
        base = max((place for place, each in enumerate(along) if each.masked and not each.num_text), default=0)
        taken = [token_id for token_id in drafts[base:] if token_id not in constraint.end_ids]
        return cls(constraint, first, first + 1 + len(drafts), along, base, taken[: along[-1].num_text])

    def spread(self, masks: np.ndarray) -> list[int]:
        """Bring what the matcher has filled from `base` on to its places; the rows of these."""
        if not self.text and self.end == self.first + 1:
            return [self.first]
        filled = self.first + self.base
        while self.along[-1].num_text and not masks[filled + self.along[-1].num_text].any():
            self.along.pop()  # the draft before it, or an earlier one, is not allowed
        rows = [(self.first + place, filled + each.num_text) for place, each in enumerate(self.along) if each.masked]
        for row, source in reversed(rows):
            if row != source:
                masks[row] = masks[source]
        return [row for row, _ in rows]


class GrammarCompiler:
    """Compiles grammars over one tokenizer. One thread makes all calls; `on_compiled` is called from others."""

    def __init__(
        self,
        tokenizer: Future[GrammarTokenizer],
        vocab_size: int,
        on_compiled: Callable[[GrammarCompiled], None],
        mask_threads: int = MASK_THREADS,
    ) -> None:
        self.counters = GrammarCounters()
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._on_compiled = on_compiled
        self._mask_threads = mask_threads
        self._lock = threading.Lock()  # of what the compiling threads write
        self._compiled: OrderedDict[Grammar, _CompiledGrammar] = OrderedDict()
        self._num_originals = 0  # ever compiled
        self._threads = ThreadPoolExecutor(COMPILE_THREADS, thread_name_prefix="grammar")
        self._executor: LLExecutor | None = None

    def compile(self, grammar: Grammar) -> Constraint | None:
        """The constraint of a sequence without tokens; None if GrammarCompiled will say when to ask `constraint`."""
        with self._lock:
            found = self._compiled.setdefault(grammar, _CompiledGrammar(self._mask_threads))
            self._compiled.move_to_end(grammar)
            while len(self._compiled) > 1 and sum(each.size for each in self._compiled.values()) > MAX_COMPILED:
                self._compiled.popitem(last=False)
            self.counters.grammar_requests += 1
            self.counters.grammar_hits += bool(found.originals)
        return self._copy(grammar, found, waited=False)

    def constraint(self, event: GrammarCompiled) -> Constraint | None:
        """The same, for a sequence that waited; None if another event follows."""
        assert isinstance(event.compiled, _CompiledGrammar)
        return self._copy(event.grammar, event.compiled, waited=True)

    def _copy(self, grammar: Grammar, compiled: _CompiledGrammar, *, waited: bool) -> Constraint | None:
        """`waited`: one of those that are being compiled is for this sequence."""
        with self._lock:
            if compiled.lacks_one and not (waited and compiled.num_pending):
                compiled.num_pending += 1
                self._threads.submit(self._compile, grammar, compiled)
            original = compiled.least_used()
        if original is None:
            return None
        constraint = Constraint(grammar, original.matcher.deep_copy(), original.number)
        original.copies.add(constraint)
        return constraint

    def masks(self, constraints: Sequence[Constraint], drafts: Sequence[Sequence[int]] = ()) -> np.ndarray:
        """What each allows next, and behind each of its drafts: int32 [constraints and drafts, ceil(vocabulary / 32)],
        as models.batch.Launched takes them. drafts: of each; empty: of none. What is behind a draft that is not allowed
        itself is never reached: some tokens are allowed there."""
        parts, size = [], 0
        for constraint, own in zip(constraints, drafts or [()] * len(constraints), strict=True):
            parts.append(_MaskedPart.of(constraint, own, size))
            size += 1 + len(own)
        masks = np.zeros((size, -(-self._vocab_size // 32)), dtype=np.int32)
        self._fill(masks, parts)
        for part in parts:
            for row, each in enumerate(part.along, part.first):
                if each is AS_MASKED:
                    continue
                if each.is_free:
                    masks[row] = ALL_TOKENS
                for token_id in each.barred:
                    masks[row, token_id // 32] &= ~_bit(token_id)
                for token_id in each.listed:
                    masks[row, token_id // 32] |= _bit(token_id)
            if (reached := part.first + len(part.along)) < part.end:
                masks[reached : part.end] = ALL_TOKENS
        return masks

    def _fill(self, masks: np.ndarray, parts: Sequence[_MaskedPart]) -> None:
        """The masks of matchers. Of parts' places those go that are not reached."""
        filled = [part for part in parts if part.along[part.base].masked]
        if not filled:
            return
        if self._executor is None:
            self._executor = LLExecutor(self._mask_threads)
        filled.sort(key=lambda part: part.constraint.lexer)  # a thread takes neighbours
        alone: list[Any] = [(part.constraint.matcher, part.first + part.base) for part in filled if not part.text]
        if alone:
            fill_next_token_bitmask_par(self._executor, alone, masks)
        drafted: list[Any] = [
            (part.constraint.matcher, part.first + part.base, part.text) for part in filled if part.text
        ]
        if drafted:
            fill_next_token_bitmask_par_with_draft_tokens(self._executor, drafted, masks)
        by_ends: dict[tuple[int, ...], list[int]] = {}
        for part in filled:
            by_ends.setdefault(part.constraint.end_ids, []).extend(part.spread(masks))
        for end_ids, rows in by_ends.items():
            self._translate_ends(masks, rows, end_ids)

    def _translate_ends(self, masks: np.ndarray, rows: Sequence[int], end_ids: Sequence[int]) -> None:
        """Let the tokens that end the text of these rows' grammar stand where the library allows its own."""
        end_id = self._tokenizer.result().end_id
        ends = [row for row, word in zip(rows, masks[rows, end_id // 32].tolist(), strict=True) if word & _bit(end_id)]
        for token_id in {end_id, *end_ids}:
            masks[rows, token_id // 32] &= ~_bit(token_id)
        for token_id in end_ids:
            masks[ends, token_id // 32] |= _bit(token_id)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    # -- compiling threads

    def _compile(self, grammar: Grammar, compiled: _CompiledGrammar) -> None:
        error, most, taken_s = "", compiled.most, 0.0
        try:
            tokens, began_at = self._tokenizer.result().tokens, thread_time()
            matcher = LLMatcher(tokens, grammar.text, limits=LLParserLimits(), log_level=0)
            taken_s = thread_time() - began_at
            most = max(1, int(COMPILE_S / max(taken_s, 1e-6)))
            error = matcher.get_error() if matcher.is_error() else ""
        except Exception as failure:  # of the library: the request fails, not the worker
            error = f"{type(failure).__name__}: {failure}"
        with self._lock:
            self.counters.grammars_compiled += 1
            self.counters.grammar_compile_seconds += taken_s
            compiled.num_pending -= 1
            compiled.most = min(compiled.most, most)
            if not error:
                self._num_originals += 1
                compiled.originals.append(_Original(matcher, self._num_originals))
            elif self._compiled.get(grammar) is compiled and not compiled.size:
                del self._compiled[grammar]
        self._on_compiled(GrammarCompiled(grammar, error, compiled))
