"""Whether a transformers model may be served over the paged pool: it is tried at load, and refused by name otherwise.

A model whose layers keep state elsewhere (recurrences, convolutions, caches of its own), or attend past the registered
interface, gives wrong answers without an error. So it must attend once in every layer, in one way (`observe`); give the
same logits for a prompt whole and in chunks, the last of which is one token, alone and beside another; and those of the
library's own eager attention (`compare`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from transformers import PreTrainedModel

from baton.models.batch import Draw, Row
from baton.models.config import ModelConfig
from baton.models.fallback.attention import NAME, PROBE, AttentionCall, listening
from baton.models.fallback.reference import WholeAttention
from baton.node.errors import SettingsError
from baton.node.messages.control import SamplingSpec
from baton.node.telemetry import excerpt

OTHER_TOKENS, PROMPTS = 9, 3
LIMITS = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (2.0**-6, 0.1), torch.float16: (2.0**-9, 0.02)}
"""Of differences of logits, relative to their norm: what is never too much (four roundings), and what always is."""
OF_NOISE = 4.0
"""Between these limits a difference may be so many times what rounding does to this model: that between two right ways
to attend for a whole prompt, the library's in its dtype and one in float32."""
STEPPED_ROPES = {"dynamic", "longrope"}


class CannotServe(SettingsError):
    """A model that transformers can run and Baton cannot serve."""

    def __init__(self, config: ModelConfig, why: str) -> None:
        super().__init__(f"{config.architecture} cannot be served through transformers: {why}")


class Trial(Protocol):
    """Steps of a model over a small pool, whose blocks 0, 1 ... hold `block_tokens` each; two prompts fit."""

    block_tokens: int

    def logits(self, rows: Sequence[Row]) -> torch.Tensor:
        """float32 [rows that draw, vocab]; rows of one step, all chunks or all one new token."""
        ...


class Observed(NamedTuple):
    """How a model attends."""

    config: ModelConfig
    """With what the model itself says."""
    calls: tuple[AttentionCall, ...]
    value_dim: int


class Expected(NamedTuple):
    """What the library answers."""

    prompt: list[int]
    other: list[int]
    logits: torch.Tensor
    """float32 [vocab], behind the prompt."""
    tolerance: float


@contextmanager
def named_refusals(config: ModelConfig) -> Iterator[None]:
    """Whatever the library's code for some family makes of a call is a CannotServe."""
    try:
        with torch.no_grad():
            yield
    except (SettingsError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CannotServe(config, f"{type(error).__name__}: {excerpt(error)}") from error


@dataclass(slots=True)
class _Listener:
    """Notes how a model attends."""

    calls: list[AttentionCall] = field(default_factory=list)
    shapes: set[tuple[int, int, int, int]] = field(default_factory=set)
    """(query heads, key heads, dimension of keys, of values)"""

    def __call__(
        self, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        self.calls.append(call)
        self.shapes.add((query.shape[1], key.shape[1], key.shape[2], value.shape[2]))
        return value.new_zeros(*query.shape[:2], value.shape[2])


def observe(config: ModelConfig, model: PreTrainedModel, head_multiple: int = 1) -> Observed:
    """How it attends. head_multiple: the pool's heads are rounded up to it. CannotServe for what no pool serves."""
    for module in model.modules():
        ropes = getattr(module, "rope_type", None)
        if stepped := STEPPED_ROPES.intersection(ropes.values() if isinstance(ropes, dict) else [ropes]):
            raise CannotServe(config, f"its rope ({stepped.pop()}) follows the longest sequence of a step")
    listener = _Listener()
    model.set_attn_implementation(PROBE)
    with listening(listener):
        tokens = torch.arange(4, device=model.device)[None]
        model(input_ids=tokens, position_ids=tokens, use_cache=False)
    model.set_attn_implementation(NAME)
    layers = [call.layer for call in listener.calls]
    if layers != list(range(config.num_layers)):
        raise CannotServe(config, f"{len(set(layers))} of its {config.num_layers} layers attend through the interface")
    if any(call.has_sinks for call in listener.calls):
        raise CannotServe(config, "it has attention sinks")
    windows = {call.window for call in listener.calls} - {None}
    scores = {call.scores for call in listener.calls}
    if len(listener.shapes) != 1 or len(scores) != 1 or len(windows) > 1:
        raise CannotServe(config, "its layers differ in heads, scales or windows")
    (num_heads, num_kv_heads, head_dim, value_dim), (scale, softcap) = listener.shapes.pop(), scores.pop()
    if value_dim > head_dim or num_heads % num_kv_heads:
        raise CannotServe(
            config, f"{num_heads} heads over {num_kv_heads}, values of {value_dim} and keys of {head_dim}"
        )
    described = replace(
        config,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=-(-head_dim // head_multiple) * head_multiple,
        score_scale=scale,
        score_softcap=softcap,
        sliding_window=windows.pop() if windows else None,
        windowed_layers=tuple(call.window is not None for call in listener.calls),
    )
    return Observed(described, tuple(listener.calls), value_dim)


def expect(config: ModelConfig, model: PreTrainedModel, tokens: int) -> Iterator[Expected]:
    """What the library's own attention gives for prompts of so many tokens, or as many as the model knows."""
    tokens = min(tokens, config.max_model_len)
    chance = torch.Generator().manual_seed(1)
    drawn = [
        [torch.randint(0, config.vocab_size, (size,), generator=chance).tolist() for size in (tokens, OTHER_TOKENS)]
        for _ in range(PROMPTS)
    ]
    least, most = LIMITS[model.dtype]
    for prompt, other in drawn:
        model.set_attn_implementation("eager")
        eager = _last_logits(model, prompt)
        model.set_attn_implementation(NAME)
        with listening(WholeAttention()):
            noise = distance(_last_logits(model, prompt), eager)
        yield Expected(prompt, other, eager, min(max(OF_NOISE * noise, least), most))


def compare(config: ModelConfig, trial: Trial, expected: Iterable[Expected]) -> None:
    """CannotServe unless the trial gives what is expected for one of the prompts: a model that keeps state elsewhere
    fails for all, one with experts that rounding chooses for some."""
    best: dict[str, float] = {}
    for each in expected:
        for what, difference in _differences(trial, each).items():
            best[what] = min(best.get(what, float("inf")), difference / each.tolerance)
        if all(share <= 1.0 for share in best.values()):
            return
    what, share = next((what, share) for what, share in best.items() if not share <= 1.0)
    raise CannotServe(config, f"{what} (by {share:.2g} times what rounding explains)")


def _differences(trial: Trial, expected: Expected) -> dict[str, float]:
    """By what differs."""
    prompt, width = expected.prompt, -(-len(expected.prompt) // trial.block_tokens)
    here, there = list(range(width)), list(range(width, 2 * width))
    draw = Draw(SamplingSpec(max_tokens=1, temperature=0.0), (), 0, 0)
    last, first = len(prompt) - 1, len(prompt) // 2
    whole = trial.logits([Row(prompt, 0, here, draw)])[0]
    beside = trial.logits([Row(prompt, 0, here, draw), Row(expected.other, 0, there, draw, 1)])[0]
    trial.logits([Row(prompt[:first], 0, here, draw)])
    trial.logits([Row(prompt[first:last], first, here, draw)])
    chunked = trial.logits([Row(prompt[last:], last, here, draw._replace(num_generated=1))])[0]
    return {
        "a prompt in chunks gives other logits than whole": distance(chunked, whole),
        "a prompt beside another gives other logits than alone": distance(beside, whole),
        "its own attention gives other logits": distance(whole, expected.logits),
    }


def _last_logits(model: PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    """float32 [vocab] on the CPU."""
    tokens = torch.tensor([prompt], device=model.device)
    logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits[0, -1]
    return logits.float().cpu()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the norm."""
    return float((found - expected).norm() / expected.norm())
