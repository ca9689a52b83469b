"""A proxy dies in the middle of a stream: its client goes on after the tokens that it has, at the next proxy."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from baton.tests.integration.cluster import Cluster
from baton.tests.integration.test_failures import new_prompt

NUM_TOKENS = 80
KINDS: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, "seeded": {"temperature": 0.8, "seed": 11}}


def tokens_of(chunk: dict[str, Any]) -> list[int]:
    return [token for choice in chunk.get("choices", ()) for token in choice.get("token_ids") or ()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_goes_on_after_the_tokens_that_it_has(kind: str) -> None:
    """Guards what docs/operations.md promises: prompt and received tokens as the next prompt give the rest of the
    answer, and the workers hold nothing of the first request."""
    body = {**KINDS[kind], "ignore_eos": True, "return_token_ids": True}
    prompt, prompt_ids, received = new_prompt(), [], []
    with Cluster(decode_step_s=0.02) as cluster:
        try:
            for chunk in cluster.stream(prompt, max_tokens=NUM_TOKENS, **body):
                prompt_ids = prompt_ids or next(
                    (ids for each in chunk["choices"] if (ids := each.get("prompt_token_ids"))), []
                )
                received += tokens_of(chunk)
                if len(received) == 10:
                    cluster.nodes.kill("proxy")
        except httpx.TransportError:
            pass
        assert 10 <= len(received) < NUM_TOKENS and prompt_ids
        cluster.nodes.start_node("proxy")
        cluster.nodes.wait_ready(2)
        rest = cluster.complete(prompt_ids + received, max_tokens=NUM_TOKENS - len(received), **body)
        received += tokens_of(rest)
        whole = cluster.complete(prompt, max_tokens=NUM_TOKENS, **body)
        assert received == tokens_of(whole)
        cluster.wait_idle()
