"""Answers that have ended, by the blocks of their prompts: what may follow a prompt that begins alike. Pure; bounded.

An answer is known by the names that the prefix cache has for blocks of its prompt, which chain the namespace, a
tenant's salt, an adapter and all tokens up to a block's end: it is found by prompts alone that could use its KV.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

MAX_ANSWERS = 2000
MAX_NAMES = 64
"""By so many blocks from a prompt's begin, and from its end, an answer is known."""
MAX_ALIKE = 8
"""Answers, the newest ones, that are known by one block."""


class PastAnswer(NamedTuple):
    names: tuple[bytes, ...]
    token_ids: array[int]


class PastAnswers:
    """The newest `max_answers` answers, of each its first `most_tokens` tokens."""

    def __init__(self, most_tokens: int, max_answers: int = MAX_ANSWERS) -> None:
        self._most_tokens, self._max_answers = most_tokens, max_answers
        self._answers: OrderedDict[int, PastAnswer] = OrderedDict()  # by number, the oldest first
        self._by_name: dict[bytes, list[int]] = {}  # numbers, the newest last
        self._next = 0

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def num_names(self) -> int:
        return len(self._by_name)

    def add(self, names: Sequence[bytes], answer: Sequence[int]) -> None:
        """names: of the full blocks of its prompt, in order."""
        known_by = _ends(names)
        if not known_by or not answer:
            return
        self._answers[self._next] = PastAnswer(known_by, array("i", answer[: self._most_tokens]))
        for name in known_by:
            numbers = self._by_name.setdefault(name, [])
            numbers.append(self._next)
            del numbers[:-MAX_ALIKE]
        self._next += 1
        while len(self._answers) > self._max_answers:
            self._forget(*self._answers.popitem(last=False))

    def similar(self, names: Sequence[bytes]) -> tuple[int, ...]:
        """Tokens of the answers whose prompts have the longest prefix in common with that of these names, up to
        `most_tokens`; the newest answer last."""
        numbers = next((self._by_name[name] for name in reversed(_ends(names)) if name in self._by_name), [])
        found: list[int] = []
        for number in reversed(numbers):
            token_ids = self._answers[number].token_ids
            if found and len(found) + len(token_ids) > self._most_tokens:
                break
            found[:0] = token_ids
        return tuple(found)

    def _forget(self, number: int, answer: PastAnswer) -> None:
        for name in answer.names:
            numbers = self._by_name[name]
            if number in numbers:
                numbers.remove(number)
            if not numbers:
                del self._by_name[name]


def _ends(names: Sequence[bytes]) -> tuple[bytes, ...]:
    return tuple(names) if len(names) <= 2 * MAX_NAMES else (*names[:MAX_NAMES], *names[-MAX_NAMES:])
