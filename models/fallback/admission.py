"""Whether a transformers model may be served over the paged pool: it is tried at load, and refused by name otherwise.

A model whose layers keep state elsewhere (recurrences, convolutions, caches of its own), or attend past the registered
interface, gives wrong answers without an error. So it must attend once in every layer, in one way; give the same logits
for a prompt whole and in chunks, alone and beside another; and those of the library's own eager attention.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel

from baton.kernels import PlainKv
from baton.models.batch import Draw, Row
from baton.models.config import ModelConfig
from baton.models.cpu.attention import PagedAttention
from baton.models.cpu.step_batch import lay_out
from baton.models.fallback.attention import NAME, AttentionCall, listening
from baton.models.fallback.decoder import FallbackDecoder
from baton.node.errors import SettingsError
from baton.node.messages.control import SamplingSpec
from baton.node.telemetry import excerpt

TRIAL_TOKENS, FIRST_CHUNK, OTHER_TOKENS, BLOCK_TOKENS = 24, 13, 9, 8
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Of the largest difference of logits, relative to the largest logit."""


class CannotServe(SettingsError):
    """A model that transformers can run and Baton cannot serve."""

    def __init__(self, config: ModelConfig, why: str) -> None:
        super().__init__(f"{config.architecture} cannot be served through transformers: {why}")


@dataclass(slots=True)
class _Trial:
    """A Listener that notes how a model attends, and attends over the step itself."""

    calls: list[AttentionCall] = field(default_factory=list)
    shapes: set[tuple[int, int, int, int]] = field(default_factory=set)
    """(query heads, key heads, dimension of keys, of values)"""

    def __call__(
        self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        self.calls.append(call)
        self.shapes.add((query.shape[1], key.shape[1], key.shape[2], value.shape[2]))
        return value.new_zeros(*query.shape[:2], value.shape[2])


def admit(config: ModelConfig, model: PreTrainedModel, dtype: torch.dtype) -> tuple[ModelConfig, FallbackDecoder]:
    """The config with what the model itself says, and the decoder; CannotServe if it cannot be served."""
    try:
        with torch.inference_mode():
            trial = _Trial()
            with listening(trial):
                tokens = torch.arange(4)[None]
                model(input_ids=tokens, position_ids=tokens, use_cache=False)
            config, value_dim = _as_it_attends(config, trial)
            decoder = FallbackDecoder(model, tuple(trial.calls), value_dim)
            _compare(config, model, decoder, dtype)
    except SettingsError:
        raise
    except Exception as error:  # whatever the library's code for some family makes of such a call
        raise CannotServe(config, f"{type(error).__name__}: {excerpt(error)}") from error
    return config, decoder


def _as_it_attends(config: ModelConfig, trial: _Trial) -> tuple[ModelConfig, int]:
    """The config of a model that attends so, and the dimension of its values."""
    layers = [call.layer for call in trial.calls]
    if layers != list(range(config.num_layers)):
        raise CannotServe(config, f"{len(set(layers))} of its {config.num_layers} layers attend through the interface")
    if any(call.has_sinks for call in trial.calls):
        raise CannotServe(config, "it has attention sinks")
    windows = {call.window for call in trial.calls} - {None}
    scores = {call.scores for call in trial.calls}
    if len(trial.shapes) != 1 or len(scores) != 1 or len(windows) > 1:
        raise CannotServe(config, "its layers differ in heads, scales or windows")
    (num_heads, num_kv_heads, head_dim, value_dim), (scale, softcap) = trial.shapes.pop(), scores.pop()
    if value_dim > head_dim or num_heads % num_kv_heads:
        raise CannotServe(
            config, f"{num_heads} heads over {num_kv_heads}, values of {value_dim} and keys of {head_dim}"
        )
    described = replace(
        config,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        score_scale=scale,
        score_softcap=softcap,
        sliding_window=windows.pop() if windows else None,
        windowed_layers=tuple(call.window is not None for call in trial.calls),
    )
    return described, value_dim


def _compare(config: ModelConfig, model: PreTrainedModel, decoder: FallbackDecoder, dtype: torch.dtype) -> None:
    chance = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, config.vocab_size, (TRIAL_TOKENS,), generator=chance).tolist()
    other = torch.randint(0, config.vocab_size, (OTHER_TOKENS,), generator=chance).tolist()
    width = -(-TRIAL_TOKENS // BLOCK_TOKENS)
    pool = torch.zeros(2 * width, config.num_kv_heads, config.num_layers, 2, BLOCK_TOKENS, config.head_dim, dtype=dtype)
    attention = PagedAttention(config, PlainKv(pool), BLOCK_TOKENS, dtype.itemsize)
    draw = Draw(SamplingSpec(max_tokens=1, temperature=0.0), (), 0, 0)

    def logits(*rows: Row) -> torch.Tensor:
        return decoder(attention, lay_out(rows, attention.shape, config.sliding_window, dtype))

    here, there = list(range(width)), list(range(width, 2 * width))
    whole = logits(Row(prompt, 0, here, draw))[0]
    logits(Row(prompt[:FIRST_CHUNK], 0, here, None))
    chunked = logits(Row(prompt[FIRST_CHUNK:], FIRST_CHUNK, here, draw))[0]
    beside = logits(Row(prompt, 0, here, draw), Row(other, 0, there, draw))[0]
    model.set_attn_implementation("eager")
    eager = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1].float()
    model.set_attn_implementation(NAME)
    for found, expected, what in (
        (chunked, whole, "a prompt in chunks gives other logits than whole"),
        (beside, whole, "a prompt beside another gives other logits than alone"),
        (whole, eager, "its own attention gives other logits"),
    ):
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference <= TOLERANCE[dtype]:
            raise CannotServe(config, f"{what} (by {difference:.2g})")
