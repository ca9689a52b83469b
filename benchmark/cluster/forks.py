"""How close two tokens were where a stream left the text that it has without faults: a rounding, or a damaged state.

Asks an undisturbed worker for the greedy request's most likely tokens. Where another rounding decided, the stream's
token is among them, and nearly as likely as the first; after lost, doubled or damaged KV it is any.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from urllib.request import Request, urlopen

from baton.benchmark.cluster.fault_streams import Fork, StreamResult

TOP = 20
JSON = {"Content-Type": "application/json"}
TIMEOUT_S = 60.0


def fork_of(result: StreamResult, url: str, model: str) -> Fork:
    """Raises OSError."""
    fields = {"model": model, "prompt": result.request.prompt, "max_tokens": result.request.max_tokens}
    shown = {"logprobs": TOP, "return_token_ids": True, "return_tokens_as_token_ids": True}
    body = json.dumps({**fields, **shown, "ignore_eos": True, "temperature": 0}).encode()
    with urlopen(Request(f"{url}/v1/completions", body, JSON), timeout=TIMEOUT_S) as answer:
        choice = json.loads(answer.read())["choices"][0]
    pairs = enumerate(zip(result.token_ids, choice["token_ids"], strict=False))
    place, (ours, right) = next((each for each in pairs if len({*each[1]}) > 1), (len(result.token_ids), (-1, -1)))
    if ours < 0:  # equal tokens and another text, or fewer tokens: no rounding does that
        return Fork(place, None)
    top: Mapping[str, float] = choice["logprobs"]["top_logprobs"][place]
    other = top.get(f"token_id:{ours}")
    return Fork(place, None if other is None else top[f"token_id:{right}"] - other)


def largest(forks: Sequence[Fork]) -> dict[str, object]:
    """For the report."""
    known = sorted(fork.margin for fork in forks if fork.margin is not None)
    return {
        "greedy": len(forks),
        "unlikely": len(forks) - len(known),
        "margin_p50": known[len(known) // 2] if known else None,
        "margin_max": known[-1] if known else None,
    }
