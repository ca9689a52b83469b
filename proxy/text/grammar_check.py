"""Grammars compiled on trial, in processes of their own: some small schemas take a compiler for ever.

Two of them, so that one hostile schema does not hold up all others. Knows no requests.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from baton.node.errors import BadRequest, Overloaded
from baton.node.messages.control import Grammar
from baton.proxy.text.bounded_process import CPU_LIMIT_S, BoundedProcess, Subject
from baton.proxy.text.grammar_request import GrammarRequest, Reasoning

PROCESSES = 2
KEPT, KEPT_CHARS = 256, 16 << 20
"""Verdicts, and characters of them with their questions; the one that was used least recently is forgotten first."""
WAIT_S = 10.0
"""For the grammars before one; each takes some milliseconds unless it is hostile."""
START_AFTER_S = 5.0
"""A server that starts has other uses for its cores. The process takes a second with the tokenizer of a large model."""
COMPILER = "baton.proxy.text.grammar_compiler"
"""A module of its own: the proxy does not load the library."""
SUBJECT = Subject("compiling the grammar", "this request: it is too complex", None)
_Question = tuple[GrammarRequest, Reasoning | None]
"""A form, with the reasoning before it where the grammar has to have that too."""


class GrammarCheck:
    """Whether grammars of the requests to one model compile."""

    def __init__(
        self, tokenizer: Path, vocab_size: int, end_ids: Sequence[int], cpu_limit_s: float = CPU_LIMIT_S
    ) -> None:
        self._end_ids = tuple(end_ids)
        first = {"tokenizer": str(tokenizer), "vocab_size": vocab_size, "end_ids": list(end_ids)}
        self._idle = [BoundedProcess(COMPILER, first, SUBJECT, cpu_limit_s) for _ in range(PROCESSES)]
        self._all = tuple(self._idle)
        self._threads = ThreadPoolExecutor(PROCESSES, "grammar")
        self._timer: asyncio.TimerHandle | None = None
        self._known: OrderedDict[_Question, str | BadRequest] = OrderedDict()
        self._known_chars = 0

    def start(self) -> None:
        """Have a process ready soon, so that the first grammar does not wait for it; called on the event loop."""
        self._timer = asyncio.get_running_loop().call_later(START_AFTER_S, self.start_process)

    def start_process(self) -> Future[None]:
        """Start the process that is used first."""
        return self._threads.submit(self._all[-1].start)

    async def compile(self, asked: GrammarRequest, reasoning: Reasoning | None = None) -> Grammar:
        """The grammar for workers; BadRequest where it does not compile, or takes too long, Overloaded where those
        before it do."""
        by_ids = reasoning is not None and bool(reasoning.end_ids)
        question = asked, None if by_ids else reasoning
        found = self._known.get(question)
        if found is None:
            found = await self._ask(question)
            self._keep(question, found)
        else:
            self._known.move_to_end(question)
        if isinstance(found, BadRequest):
            raise BadRequest(str(found), param=found.param or asked.param)
        if reasoning is None or not by_ids:
            return Grammar(text=found, end_ids=self._end_ids)
        return Grammar(
            text=found,
            end_ids=self._end_ids,
            begins_after=reasoning.end_ids,
            opened_by=() if reasoning.begun else reasoning.start_ids,
            blank_ids=reasoning.blank_ids,
        )

    def _keep(self, question: _Question, found: str | BadRequest) -> None:
        if question in self._known:  # asked twice at once
            return
        self._known[question] = found
        self._known_chars += _num_chars(question, found)
        while len(self._known) > KEPT or self._known_chars > KEPT_CHARS:
            self._known_chars -= _num_chars(*self._known.popitem(last=False))

    async def _ask(self, question: _Question) -> str | BadRequest:
        if not self._end_ids:
            return BadRequest("this model has no end token, so it cannot end an answer of a given form")
        try:
            async with asyncio.timeout(WAIT_S):
                return await asyncio.get_running_loop().run_in_executor(self._threads, self._compile, question)
        except TimeoutError:
            raise Overloaded("grammars of other requests take too long to compile") from None
        except BadRequest as error:
            return error

    def _compile(self, question: _Question) -> str:
        asked, reasoning = question
        request = {
            "asked": dataclasses.asdict(asked),
            "reasoning": None if reasoning is None else dataclasses.asdict(reasoning),
        }
        process = self._idle.pop()  # as many threads as processes
        try:
            return str(process.ask(request)["text"])
        finally:
            self._idle.append(process)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._all:
            process.close()


def _num_chars(question: _Question, found: str | BadRequest) -> int:
    return len(question[0].text) + len(str(found))
