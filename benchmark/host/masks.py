"""The time of masks: which tokens a grammar allows next, for kinds of JSON values, with the tokenizer of any model.

JSON lines: `kind` the masks along one text of a kind, in microseconds of one thread's processor time, before and after
the grammar was used ("cold" and "warm"); `batch` the milliseconds in which many rows of one schema get their masks.
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

import baton
from baton.benchmark.harness.json_lines import JsonLines
from baton.benchmark.harness.options import new_parser
from baton.benchmark.harness.processes import machine_text
from baton.benchmark.harness.statistics import percentile
from baton.benchmark.load.table import markdown
from baton.node.messages.control import Grammar
from baton.proxy.text.grammar import lark_of
from baton.proxy.text.grammar_request import GrammarRequest
from baton.worker.constraint import Constraint, GrammarCompiled
from baton.worker.grammar_tokenizer import loading_grammar_tokenizer
from baton.worker.grammars import MASK_THREADS, GrammarCompiler

DEMO = Path(baton.__file__).parent / "models" / "demo"
PROSE = (
    "The quick brown fox, which jumps over the lazy dog, finds a configuration of uncommon words in the garden. " * 4
)
END = 0
"""A token that ends answers; which it is does not matter here."""


def text_schema(**keywords: Any) -> dict[str, Any]:
    return {"type": "string", **keywords}


def record(text: dict[str, Any]) -> dict[str, Any]:
    properties = {"name": text, "age": {"type": "integer"}, "tags": {"type": "array", "items": text}}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


RECORD = {"name": PROSE[:24], "age": 31, "tags": [PROSE[30:50], PROSE[60:84]]}
KINDS: dict[str, tuple[dict[str, Any], Any]] = {
    "string": (text_schema(), PROSE[:120]),
    "maxLength 10": (text_schema(maxLength=10), PROSE[:10]),
    "maxLength 24": (text_schema(maxLength=24), PROSE[:24]),
    "maxLength 100": (text_schema(maxLength=100), PROSE[:100]),
    "maxLength 1000": (text_schema(maxLength=1000), PROSE[:300]),
    "minLength 5, maxLength 40": (text_schema(minLength=5, maxLength=40), PROSE[:40]),
    "pattern ^[a-z]{3,30}$": (text_schema(pattern="^[a-z]{3,30}$"), "abcdefghijklmnopqrstuvwxyz"),
    "pattern of identifiers": (text_schema(pattern="^[A-Za-z0-9_-]{1,64}$"), "get_weather_in_the_city-of-London"),
    "pattern of words": (text_schema(pattern=r"^\w+( \w+)*$"), "Hello there this is a text of some length"),
    "pattern ^[ -~]{1,80}$": (text_schema(pattern="^[ -~]{1,80}$"), "Some text, with (punctuation) and more"),
    "email": (text_schema(format="email"), "someone.unknown@example.com"),
    "uri": (text_schema(format="uri"), "https://www.example.com/a/path?query=1#part"),
    "date-time": (text_schema(format="date-time"), "2024-01-02T03:04:05Z"),
    "enum": ({"enum": ["red", "green", "a longer value of the enumeration"]}, "a longer value of the enumeration"),
    "object": (record(text_schema()), RECORD),
    "object, maxLength 24": (record(text_schema(maxLength=24)), RECORD),
    "any object": ({"type": "object"}, {**RECORD, "more": [1, 2.5, {"on": True}]}),
}
IN_BATCHES = ("string", "maxLength 24", "object", "object, maxLength 24")


class Compiler:
    """Compiles with the wait that a worker's loop does not have."""

    def __init__(self, folder: Path, threads: int) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._compiled: queue.SimpleQueue[GrammarCompiled] = queue.SimpleQueue()
        with loading_grammar_tokenizer(folder / "tokenizer.json", config["vocab_size"], [END]) as tokenizer:
            self.grammars = GrammarCompiler(tokenizer, config["vocab_size"], self._compiled.put, threads)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def constraints(self, schema: dict[str, Any], number: int) -> list[Constraint]:
        text = lark_of(GrammarRequest("json", json.dumps(schema), "schema"))
        grammar = Grammar(text=text, end_ids=(END,))
        found = [self.grammars.compile(grammar) for _ in range(number)]
        while None in found:
            if (event := self._compiled.get()).error:
                raise SystemExit(f"{schema}: {event.error}")
            found = [each or self.grammars.constraint(event) for each in found]
        return [each for each in found if each is not None]

    def token_ids(self, value: Any) -> list[int]:
        return self._tokenizer.encode(json.dumps(value, ensure_ascii=False), add_special_tokens=False).ids


def along(compiler: Compiler, schema: dict[str, Any], token_ids: Sequence[int]) -> list[float]:
    """Microseconds of each mask of one row."""
    (constraint,), taken = compiler.constraints(schema, 1), []
    for token_id in token_ids:
        began_s = time.thread_time()
        compiler.grammars.masks([constraint])
        taken.append((time.thread_time() - began_s) * 1e6)
        constraint.advance([token_id])
    if constraint.is_broken:
        raise SystemExit(f"{schema} does not allow its example")
    return taken


def batch_ms(compiler: Compiler, schema: dict[str, Any], token_ids: Sequence[int], rows: int) -> list[float]:
    """Milliseconds of each step in which all rows, each at a place of its own in the text, get their masks."""
    constraints, taken = compiler.constraints(schema, rows), []
    places = [row % len(token_ids) for row in range(rows)]
    for place, constraint in zip(places, constraints, strict=True):
        constraint.advance(token_ids[:place])
    for _ in range(len(token_ids)):
        inside = [number for number in range(rows) if places[number] < len(token_ids)]
        began_s = time.perf_counter()
        compiler.grammars.masks([constraints[number] for number in inside])
        if len(inside) >= rows / 2:
            taken.append((time.perf_counter() - began_s) * 1000)
        for number in inside:
            constraints[number].advance([token_ids[places[number]]])
            places[number] += 1
    return taken


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    lines, compiler = JsonLines(options.output), Compiler(options.tokenizer, options.threads)
    lines.begin(argv, threads=options.threads)
    rows = []
    for name, (schema, value) in KINDS.items():
        token_ids = compiler.token_ids(value)
        cold = along(compiler, schema, token_ids)
        warm = np.min([along(compiler, schema, token_ids) for _ in range(options.repeat)], axis=0).tolist()
        found = {"cold_mean": float(np.mean(cold)), "mean": float(np.mean(warm))}
        found |= {"p50": percentile(warm, 50), "p99": percentile(warm, 99), "max": max(warm)}
        lines.put("kind", name=name, **{f"{key}_us": time_us for key, time_us in found.items()})
        rows.append([name, *(f"{time_us:.0f}" for time_us in found.values())])
    for name in IN_BATCHES:
        schema, value = KINDS[name]
        taken = batch_ms(compiler, schema, compiler.token_ids(value), options.rows)
        lines.put("batch", name=name, rows=options.rows, p50_ms=percentile(taken, 50), max_ms=max(taken))
    print(markdown(("masks, us of processor time", "cold mean", "mean", "p50", "p99", "max"), rows))
    print(machine_text())
    return 0


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = new_parser("masks", __doc__)
    add = parser.add_argument
    add("--tokenizer", type=Path, default=DEMO, help="folder with tokenizer.json and config.json")
    add("--threads", type=int, default=MASK_THREADS, help="threads that make masks of a batch")
    add("--rows", type=int, default=64, help="rows of a batch, all of one schema")
    add("--repeat", type=int, default=7, help="times that each text is walked; the quickest counts")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
