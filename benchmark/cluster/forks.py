"""How close two tokens were where a stream left the text that it has without faults: a rounding, or a damaged state.

Asks an undisturbed worker for the greedy request's most likely tokens. Where another rounding decided, the stream's
token is among them, and nearly as likely as the first; after lost, doubled or damaged KV it is any.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.request import Request, urlopen

from baton.benchmark.cluster.fault_streams import StreamResult

TOP = 20
JSON = {"Content-Type": "application/json"}
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Fork:
    """Of one greedy stream."""

    place: int
    """Tokens before it."""
    pause: int | None
    """Tokens before the stream's first pause."""
    margin: float | None
    """The log probability of the undisturbed token less that of the stream's; None: that is not among the likeliest."""


def fork_of(result: StreamResult, url: str, model: str) -> Fork:
    """Raises OSError."""
    fields = {"model": model, "prompt": result.request.prompt, "max_tokens": result.request.max_tokens}
    shown = {"logprobs": TOP, "return_token_ids": True, "return_tokens_as_token_ids": True}
    body = json.dumps({**fields, **shown, "ignore_eos": True, "temperature": 0}).encode()
    with urlopen(Request(f"{url}/v1/completions", body, JSON), timeout=TIMEOUT_S) as answer:
        choice = json.loads(answer.read())["choices"][0]
    place, (ours, right) = next(
        (n, pair) for n, pair in enumerate(zip(result.token_ids, choice["token_ids"], strict=False)) if len({*pair}) > 1
    )
    top: Mapping[str, float] = choice["logprobs"]["top_logprobs"][place]
    other = top.get(f"token_id:{ours}")
    return Fork(place, result.first_pause, None if other is None else top[f"token_id:{right}"] - other)


def largest(forks: Sequence[Fork]) -> dict[str, object]:
    """For the report."""
    known = sorted(fork.margin for fork in forks if fork.margin is not None)
    return {
        "greedy": len(forks),
        "unlikely": len(forks) - len(known),
        "margin_p50": known[len(known) // 2] if known else None,
        "margin_max": known[-1] if known else None,
    }
