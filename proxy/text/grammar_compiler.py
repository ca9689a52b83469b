"""python -m baton.proxy.text.grammar_compiler: the process in which grammars are compiled on trial.

Started by grammar_check; it has no socket but the one to its parent.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from baton.node.errors import BadRequest
from baton.node.messages.control import MAX_GRAMMAR_CHARACTERS
from baton.proxy.text.bounded_process import Handler, Reply, answer_requests
from baton.proxy.text.call_grammar import lark_of_request
from baton.proxy.text.call_request import CallRequest
from baton.proxy.text.grammar import behind_reasoning, lark_of
from baton.proxy.text.grammar_request import GrammarRequest, Reasoning

NOTHING_FITS = "NoExtensionBias"
"""How the library calls a mask without any token."""


def _prepare(first: Mapping[str, Any]) -> Handler:
    text = Path(first["tokenizer"]).read_text(encoding="utf-8")
    no_masks: list[str] = []
    tokenizer = LLTokenizer(text, n_vocab=first["vocab_size"], eos_token=first["end_ids"], slices=no_masks)

    def complaint(lark: str) -> str:
        matcher = LLMatcher(tokenizer, lark, log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()  # an error where not even a first token is allowed
        return _reason(matcher.get_error()) if matcher.is_error() else ""

    def lark_of_one(asked: GrammarRequest) -> str:
        if asked.kind == "calls":
            calls = CallRequest.from_text(asked.text)
            special = {
                marker for marker, token_id in calls.rules.tokens.items() if tokenizer.is_special_token(token_id)
            }
            return lark_of_request(calls, special, complaint)
        lark = lark_of(asked)
        reason = complaint(lark) if len(lark) <= MAX_GRAMMAR_CHARACTERS else ""
        if reason:
            raise BadRequest(f"{asked.param} is not supported: {reason}", param=asked.param)
        return lark

    def compile_one(request: Mapping[str, Any]) -> Reply:
        asked, reasoning = GrammarRequest(**request["asked"]), request["reasoning"]
        lark = lark_of_one(asked)
        if reasoning is not None:
            lark = behind_reasoning(lark, Reasoning(**reasoning))
            if reason := complaint(lark):
                raise BadRequest(f"{asked.param} is not supported: {reason}", param=asked.param)
        if len(lark) > MAX_GRAMMAR_CHARACTERS:
            raise BadRequest(f"{asked.param} is too long", param=asked.param)
        return {"text": lark}

    return compile_one


def _reason(error: str) -> str:
    """The library's message without the place in the grammar that was made of the request, and its lines."""
    if error.startswith(NOTHING_FITS):
        return "nothing fits it"
    first, *rest = re.sub(r"^at \d+\(\d+\): ", "", error.strip()).split("\n")
    causes = [line.removeprefix("error: ") for line in rest if line.startswith("error: ")]
    return " ".join([first, *causes])[:500]


if __name__ == "__main__":
    sys.exit(answer_requests(sys.argv[1:], _prepare))
