"""worker.stopping: a sequence ends once, with the right finish reason."""

from __future__ import annotations

import pytest

from baton.node.messages.control import SamplingSpec
from baton.worker.stopping import finish_of


@pytest.mark.parametrize(
    ("token", "generated", "tokens", "expected"),
    [
        (9, 5, 20, "stop"),
        (9, 2, 20, ""),  # a stop token within min_tokens does not end it
        (9, 3, 20, "stop"),
        (1, 5, 20, ""),
        (1, 8, 20, "length"),
        (9, 8, 20, "stop"),  # both at once: the stop token takes precedence
        (1, 5, 64, "length"),  # the model's longest sequence
    ],
)
def test_reasons(token: int, generated: int, tokens: int, expected: str) -> None:
    """Guards stop before length, min_tokens, max_tokens and the model's length, each at its border."""
    sampling = SamplingSpec(max_tokens=8, min_tokens=2, stop_token_ids=(9,))
    assert finish_of(token, sampling, generated, tokens, max_model_len=64) == expected
