"""The weights of an EAGLE-3 draft, from the safetensors files of its folder, or random ones: of one rank, or whole.

What the folder leaves out is the model's: the embedding, and the head where the draft has the model's vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from baton.kernels import DenseLinear, Linear, Scores
from baton.models.checkpoint import Checkpoint, StoredTensor
from baton.models.eagle_config import EagleConfig
from baton.models.fingerprint import DUMMY_SEED, DUMMY_STD
from baton.models.layer_weights import Weights
from baton.models.layers import GroupedAttention
from baton.models.partition import WHOLE, Rank
from baton.models.sources import read_sources
from baton.node.errors import SettingsError

LAYER_PREFIXES = ("midlayer.", "layers.0.", "model.layers.0.")
"""Of the authors, and of speculators."""
TARGETS, MASK = "d2t", "t2d"
"""Of each token of the draft, what is added to make it one of the model; and whether a token of the model is one of the
draft, which nothing here asks."""


@dataclass(frozen=True, slots=True)
class EagleWeights:
    """H: hidden size of the draft, V: its vocabulary, T: elements of the hidden states that it takes."""

    embedding: torch.Tensor  # [vocabulary of the model, H]
    fc: Linear  # [H, T]
    input_norm: torch.Tensor  # [H]
    hidden_norm: torch.Tensor  # [H]
    qkv: Linear  # [heads, 2 H]
    o: Linear  # [H, heads]
    post_norm: torch.Tensor  # [H]
    gate_up: Linear  # [2 * intermediate, H]
    down: Linear  # [H, intermediate]
    norm: torch.Tensor  # [H]
    head: Linear  # [V, H]
    tokens: torch.Tensor  # int64 [V]: the model's token of each of the draft's
    size_bytes: int
    """Of what is its own."""

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.fc, self.qkv, self.o, self.gate_up, self.down, self.head


def attention_of(config: EagleConfig) -> GroupedAttention:
    """How the draft's layer attends."""
    return GroupedAttention(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        window=None,
        qkv_bias=False,
        o_bias=False,
        head_norms=False,
        whole_norms=False,
        sinks=False,
        rope=config.rope,
        scores=Scores(config.head_dim**-0.5, None),
    )


def load_eagle(
    config: EagleConfig, folder: Path, model: Weights, load_format: str, *, pack: bool, rank: Rank = WHOLE
) -> EagleWeights:
    """The folder's weights in the dtype, and on the device, of the model's; `dummy` makes random ones without reading
    any. pack: prepare them for the CPU's products. rank: whose heads and rows of the MLP; all else is whole.
    SettingsError for a tensor that is missing, or of another size."""
    like = model.embedding
    if load_format == "dummy":
        stored = _random(config, like)
    else:
        stored = _read(config, folder, like)
    weights = _joined(config, _cut(config, stored, rank), model, folder)
    if pack:
        for linear in weights.linears:
            if linear is not model.lm_head:
                linear.pack()
    return weights


def _shapes(config: EagleConfig) -> dict[str, tuple[int, ...]]:
    """Of all tensors that a folder must have."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = {
        "input_layernorm": (hidden,),
        "hidden_norm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (query, 2 * hidden),
        "self_attn.k_proj": (key, 2 * hidden),
        "self_attn.v_proj": (key, 2 * hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    named = {f"{LAYER_PREFIXES[0]}{name}.weight": shape for name, shape in layer.items()}
    return {"fc.weight": (hidden, config.tapped_size), **named, "norm.weight": (hidden,)}


def _cut(config: EagleConfig, stored: Mapping[str, torch.Tensor], rank: Rank) -> dict[str, torch.Tensor]:
    """What a rank computes with of each tensor."""
    if rank.count == 1:
        return dict(stored)
    dim, keys = config.head_dim, rank.key_heads(config.num_kv_heads)
    query = rank.share(config.num_heads, "query heads of the draft")
    inner = rank.share(config.intermediate_size, "rows of the draft's MLP")
    of_query, of_keys = slice(query.start * dim, query.stop * dim), slice(keys.start * dim, keys.stop * dim)
    of_inner = slice(inner.start, inner.stop)
    cuts = {
        "self_attn.q_proj": (0, of_query),
        "self_attn.k_proj": (0, of_keys),
        "self_attn.v_proj": (0, of_keys),
        "self_attn.o_proj": (1, of_query),
        "mlp.gate_proj": (0, of_inner),
        "mlp.up_proj": (0, of_inner),
        "mlp.down_proj": (1, of_inner),
    }
    own = dict(stored)
    for name, (axis, kept) in cuts.items():
        whole = own[f"{LAYER_PREFIXES[0]}{name}.weight"]
        part = whole[kept] if axis == 0 else whole[:, kept]
        own[f"{LAYER_PREFIXES[0]}{name}.weight"] = part.clone(memory_format=torch.contiguous_format)
    return own


def _optional(config: EagleConfig) -> dict[str, tuple[int, ...]]:
    return {
        "lm_head.weight": (config.draft_vocab_size, config.hidden_size),
        "embed_tokens.weight": (config.vocab_size, config.hidden_size),
        TARGETS: (config.draft_vocab_size,),
    }


def _random(config: EagleConfig, like: torch.Tensor) -> dict[str, torch.Tensor]:
    """A head of its own, whose tokens are the model's first; and norm weights of 1."""
    generator = torch.Generator(like.device).manual_seed(DUMMY_SEED)
    shapes = _shapes(config) | {"lm_head.weight": (config.draft_vocab_size, config.hidden_size)}
    if config.hidden_size != config.model_size:
        shapes["embed_tokens.weight"] = (config.vocab_size, config.hidden_size)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        empty = torch.empty(shape, dtype=like.dtype, device=like.device)
        return empty.fill_(1.0) if len(shape) == 1 else empty.normal_(0.0, DUMMY_STD, generator=generator)

    made = {name: draw(shape) for name, shape in shapes.items()}
    return made | {TARGETS: torch.zeros(config.draft_vocab_size, dtype=torch.int64, device=like.device)}


def _read(config: EagleConfig, folder: Path, like: torch.Tensor) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    prefix = next((each for each in LAYER_PREFIXES if any(name.startswith(each) for name in checkpoint.holders)), "")
    required, sources = _shapes(config), {}
    for name, shape in (required | _optional(config)).items():
        stored = checkpoint.find(name.replace(LAYER_PREFIXES[0], prefix))
        if stored is None and name in required:
            raise SettingsError(f"{folder}: tensor {name} is missing: this is no EAGLE-3 draft of one layer")
        if stored is not None:
            found = checkpoint.forms[stored.name]
            if found.shape != shape or found.is_floating_point == (name == TARGETS):
                kind = "whole numbers" if name == TARGETS else "floating point"
                raise SettingsError(
                    f"{folder}: tensor {stored.name} is {found.dtype} {list(found.shape)}, expected {kind} "
                    f"{list(shape)}"
                )
            sources[name] = stored
    _refuse_others(checkpoint, sources)
    read = {name: parts[""] for name, parts in read_sources(checkpoint, dict(sources))}
    return {
        name: tensor.to(like.device, torch.int64 if name == TARGETS else like.dtype) for name, tensor in read.items()
    }


def _refuse_others(checkpoint: Checkpoint, used: Mapping[str, StoredTensor]) -> None:
    """A tensor that no layer here has would be left out of what the draft computes."""
    known = {stored.name for stored in used.values()}
    others = [name for name in checkpoint.holders if name not in known and not name.endswith((MASK, ".inv_freq"))]
    if others:
        raise SettingsError(f"{checkpoint.folder}: tensor {min(others)} has no place in a draft as it is served")


def _joined(config: EagleConfig, stored: Mapping[str, torch.Tensor], model: Weights, folder: Path) -> EagleWeights:
    def layer(*names: str) -> torch.Tensor:
        parts = [stored[f"{LAYER_PREFIXES[0]}{name}.weight"] for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    own = dict(stored)
    same_size = config.hidden_size == config.model_size
    if "embed_tokens.weight" not in own and not same_size:
        raise SettingsError(
            f"{folder}: hidden_size of the draft is {config.hidden_size}, of the model {config.model_size}, and there "
            "is no tensor embed_tokens.weight"
        )
    head: Linear
    if "lm_head.weight" in own:
        head = DenseLinear(own["lm_head.weight"])
    elif same_size and config.draft_vocab_size == config.vocab_size == model.lm_head.num_outputs:
        head = model.lm_head
    else:
        raise SettingsError(
            f"{folder}: tensor lm_head.weight is missing, and the model's head has other sizes, or is cut for ranks"
        )
    return EagleWeights(
        embedding=own.get("embed_tokens.weight", model.embedding),
        fc=DenseLinear(own["fc.weight"]),
        input_norm=layer("input_layernorm"),
        hidden_norm=layer("hidden_norm"),
        qkv=DenseLinear(layer("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        o=DenseLinear(layer("self_attn.o_proj")),
        post_norm=layer("post_attention_layernorm"),
        gate_up=DenseLinear(layer("mlp.gate_proj", "mlp.up_proj")),
        down=DenseLinear(layer("mlp.down_proj")),
        norm=own["norm.weight"],
        head=head,
        tokens=_tokens(config, own.get(TARGETS), folder, model.embedding.device),
        size_bytes=sum(tensor.nbytes for tensor in own.values()),
    )


def _tokens(config: EagleConfig, offsets: torch.Tensor | None, folder: Path, device: torch.device) -> torch.Tensor:
    own = torch.arange(config.draft_vocab_size, dtype=torch.int64, device=device)
    if offsets is None:
        if config.draft_vocab_size != config.vocab_size:
            raise SettingsError(
                f"{folder}: tensor {TARGETS} is missing, and the draft has {config.draft_vocab_size} tokens of "
                f"{config.vocab_size}"
            )
        return own
    tokens = own + offsets
    if not bool(((tokens >= 0) & (tokens < config.vocab_size)).all()):
        raise SettingsError(f"{folder}: tensor {TARGETS} names tokens that the model does not have")
    return tokens
