"""Rows of the embedding or the head that an adapter has for some tokens (PEFT's trainable_token_indices), as pairs:

    embedding:  e_t = W_t + b a[:, t]      a [n, vocab], one where the n-th token is; b [hidden, n], new rows less own
    head:       y = W x + b (a x)          a [n, hidden], new rows less own; b [vocab, n]

Of a tied model both change, as PEFT does it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from baton.models.adapters.adapter import LowRank
from baton.models.adapters.base_rows import BaseRows
from baton.models.adapters.modules import EMBEDDING, LM_HEAD, name_in_decoder
from baton.models.adapters.tensors import checked
from baton.models.config import ModelConfig
from baton.node.errors import AdapterError
from baton.node.telemetry import excerpt

ENDING = ".token_adapter.trainable_tokens_delta"


def take_token_rows(
    tensors: dict[str, torch.Tensor], config: ModelConfig, tokens: Mapping[str, tuple[int, ...]], base_rows: BaseRows
) -> dict[str, LowRank]:
    """By module, taken out of the tensors. tokens: by the module's own name, those that have rows. Raises AdapterError
    unless all have."""
    pairs, left = {}, dict(tokens)
    for name in [name for name in tensors if name.endswith(ENDING)]:
        module = name_in_decoder(name).removesuffix(ENDING)
        numbers = left.pop(module.rpartition(".")[2], None)
        if module not in (EMBEDDING, LM_HEAD) or numbers is None or (module == LM_HEAD and config.tie_word_embeddings):
            raise AdapterError(f"tensor {excerpt(name)}: rows of tokens that 'trainable_token_indices' does not name")
        rows = checked(name, tensors.pop(name), 2)
        shape = [len(numbers), config.hidden_size]
        if list(rows.shape) != shape or max(numbers) >= config.vocab_size:
            raise AdapterError(
                f"tensor {excerpt(name)}: is {list(rows.shape)}, by the model and 'trainable_token_indices' {shape}, "
                f"of tokens below {config.vocab_size}"
            )
        for changed in (EMBEDDING, LM_HEAD) if config.tie_word_embeddings else (module,):
            own = base_rows(f"{changed}.weight", list(numbers))
            if own is None:
                raise AdapterError(f"tensor {excerpt(name)}: rows of tokens need the model's own, plain")
            pairs[changed] = _pair(changed, rows.float() - own.float(), numbers, config.vocab_size)
    if left:
        raise AdapterError(f"'trainable_token_indices' has tokens of {excerpt(min(left), 80)}, and no tensor has rows")
    return pairs


def _pair(module: str, change: torch.Tensor, tokens: tuple[int, ...], vocab_size: int) -> LowRank:
    """change: of the rows of these tokens."""
    places = torch.zeros(vocab_size, len(tokens))
    places[list(tokens), range(len(tokens))] = 1.0
    return LowRank(places.t(), change.t()) if module == EMBEDDING else LowRank(change, places)
