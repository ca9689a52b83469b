"""The calls of one answer: their ids, which one is open, and the events that it makes.

Knows no format: readers say when a call begins, what its arguments are and when it ends.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from baton.proxy.formats.events import CallArguments, CallBegin, CallEnd, FormatEvent

NO_ARGUMENTS = "{}"
MAX_DIGESTED_CHARS = 200


class CallWriter:
    """Appends the events of calls to `events`."""

    def __init__(
        self,
        tools: Mapping[str, Mapping[str, Any]],
        id_of: Callable[[int], str],
        max_calls: int | None,
        events: list[FormatEvent],
    ) -> None:
        """`tools`: the declared functions with the JSON schemas of their parameters; `id_of`: of a call's index."""
        self.num_calls = 0
        """Begun so far, those beyond `max_calls` included, which make no events."""
        self.broken: list[str] = []
        """Of each call that the model did not write as its format demands, a digest of its beginning."""
        self.is_open = False
        self.schema: Mapping[str, Any] = {}
        """Of the parameters of the function that was called last."""
        self._tools = tools
        self._id_of = id_of
        self._max_calls = max_calls
        self._events = events
        self._muted = False
        self._has_arguments = False
        self._beginning = ""
        """Of the open call."""
        self._ids: set[str] = set()
        """Those that the model wrote."""

    @property
    def is_full(self) -> bool:
        """A call beyond `max_calls` has begun."""
        return self._max_calls is not None and self.num_calls > self._max_calls

    def begin(self, name: str, written_id: str = "") -> bool:
        """Whether there is such a function; if so, its call has begun. `written_id`: what the model wrote as the id of
        the call, which it is unless an earlier one has it."""
        if name not in self._tools:
            return False
        self.is_open = True
        self._beginning = name
        self._has_arguments = False
        self.schema = self._tools[name]
        self.num_calls += 1
        self._muted = self.is_full
        if not self._muted:
            index = self.num_calls - 1
            is_new = written_id and written_id not in self._ids
            self._ids.add(written_id)
            self._events.append(CallBegin(index, written_id if is_new else self._id_of(index), name))
        return True

    def arguments(self, text: str) -> None:
        if not text:
            return
        self._has_arguments = True
        if len(self._beginning) < MAX_DIGESTED_CHARS:
            self._beginning += text
        if not self._muted:
            self._events.append(CallArguments(self.num_calls - 1, text))

    def end(self, *, broken: bool, cut: bool = False) -> None:
        """A complete call without arguments has an empty object; a broken one stays as it is. `cut`: it might have been
        completed, so it does not count as broken."""
        if not broken and not self._has_arguments:
            self.arguments(NO_ARGUMENTS)
        self.is_open = False
        if broken and not cut:
            self.reject(self._beginning)
        if not self._muted:
            self._events.append(CallEnd(self.num_calls - 1, broken))

    def reject(self, text: str) -> None:
        """What `text` begins was to be a call."""
        digested = text[:MAX_DIGESTED_CHARS].encode(errors="surrogatepass")
        self.broken.append(hashlib.sha256(digested).hexdigest()[:16])
