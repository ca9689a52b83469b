"""EAGLE-3 drafts as folders for tests: random ones in each layout, and one that always proposes what a model says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from baton.models.config import ModelConfig
from baton.models.eagle_weights import LAYER_PREFIXES

MIDLAYER, SPECULATORS = LAYER_PREFIXES[:2]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
SIGNS, HIDDEN, HEAD_DIM, VOCABULARY = 16, 32, 16, 60
"""Of the pair: elements of a token, and of a hidden state, which holds the last two tokens."""
SHARPNESS = 100.0


def random_draft(folder: Path, model: ModelConfig, prefix: str = MIDLAYER, **config: Any) -> dict[str, torch.Tensor]:
    """A draft of 3/4 of the model's tokens, its hidden states as wide as the model's; its tensors, by the authors'
    names. prefix: of the layout. config: fields that differ, taken into account in the tensors' sizes."""
    fields = {
        "hidden_size": model.hidden_size,
        "intermediate_size": 56,
        "num_attention_heads": 2 * model.num_kv_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "num_hidden_layers": 1,
        "vocab_size": model.vocab_size,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "draft_vocab_size": model.vocab_size * 3 // 4,
    } | config
    hidden, inner, dim = fields["hidden_size"], fields["intermediate_size"], fields["head_dim"]
    query, key = fields["num_attention_heads"] * dim, fields["num_key_value_heads"] * dim
    num_taps = len(fields.get("eagle_aux_hidden_state_layer_ids", (0, 0, 0)))
    generator = torch.Generator().manual_seed(23)

    def draw(*shape: int) -> torch.Tensor:
        spread = torch.randn(shape, generator=generator) * 0.2
        return 1 + spread if len(shape) == 1 else spread

    kept = torch.randperm(model.vocab_size, generator=generator)[: fields["draft_vocab_size"]].sort().values
    tensors = {
        "fc.weight": draw(hidden, num_taps * model.hidden_size),
        f"{MIDLAYER}input_layernorm.weight": draw(hidden),
        f"{MIDLAYER}hidden_norm.weight": draw(hidden),
        f"{MIDLAYER}post_attention_layernorm.weight": draw(hidden),
        f"{MIDLAYER}self_attn.q_proj.weight": draw(query, 2 * hidden),
        f"{MIDLAYER}self_attn.k_proj.weight": draw(key, 2 * hidden),
        f"{MIDLAYER}self_attn.v_proj.weight": draw(key, 2 * hidden),
        f"{MIDLAYER}self_attn.o_proj.weight": draw(hidden, query),
        f"{MIDLAYER}mlp.gate_proj.weight": draw(inner, hidden),
        f"{MIDLAYER}mlp.up_proj.weight": draw(inner, hidden),
        f"{MIDLAYER}mlp.down_proj.weight": draw(hidden, inner),
        "norm.weight": draw(hidden),
        "lm_head.weight": draw(len(kept), hidden),
        "d2t": kept - torch.arange(len(kept)),
        "t2d": torch.zeros(model.vocab_size, dtype=torch.bool).index_fill_(0, kept, True),
    }
    if hidden != model.hidden_size:
        tensors["embed_tokens.weight"] = draw(model.vocab_size, hidden)
    save_draft(folder, tensors, fields, prefix)
    return tensors


def save_draft(folder: Path, tensors: dict[str, torch.Tensor], fields: dict[str, Any], prefix: str = MIDLAYER) -> None:
    folder.mkdir(exist_ok=True)
    if prefix == SPECULATORS:
        outer = {name: fields.pop(name) for name in ("draft_vocab_size", "norm_before_residual") if name in fields}
        fields = {"speculators_model_type": "eagle3", "transformer_layer_config": fields, **outer}
    else:
        fields = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", **fields}
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(
        {name.replace(MIDLAYER, prefix): tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )


def write_pair(model: Path, draft: Path, *, num_layers: int = 4, mlp_size: int = 8) -> None:
    """A model whose next token depends on the last two, by its first layer, while the others are identity; and a draft
    that computes the same.

    A token is a vector e of signs, the first of them 1. Hidden states are [e(t_i) | e(t_i-1)]: attention of the model
    looks at the token before, that of the draft at its own entry, by queries and keys that are constant before rope.
    """
    generator = torch.Generator().manual_seed(5)
    signs = torch.randint(0, 2, (VOCABULARY, SIGNS), generator=generator) * 2.0 - 1
    signs[:, 0] = 1.0
    embedding = torch.cat((signs, torch.zeros_like(signs)), 1)
    head = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    first, both = torch.eye(SIGNS, HIDDEN), torch.eye(HIDDEN)
    swap = torch.cat((torch.zeros(SIGNS, SIGNS), torch.eye(SIGNS)), 0)  # into the second half
    constant = torch.zeros(HEAD_DIM, HIDDEN)
    constant[: HEAD_DIM // 2, 0] = SHARPNESS  # the first element of each rotated pair
    angles = 1.0 / 10000.0 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    before = torch.zeros(HEAD_DIM, HIDDEN)  # turned back by one place
    before[: HEAD_DIM // 2, 0], before[HEAD_DIM // 2 :, 0] = SHARPNESS * angles.cos(), -SHARPNESS * angles.sin()
    half = 0.5**0.5  # norms see tokens alone, and make them larger by its inverse
    nothing = torch.zeros(HEAD_DIM, HIDDEN)

    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(HIDDEN), "lm_head.weight": head}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        looks = layer == 0
        tensors |= {
            f"{prefix}input_layernorm.weight": torch.ones(HIDDEN),
            f"{prefix}post_attention_layernorm.weight": torch.ones(HIDDEN),
            f"{prefix}self_attn.q_proj.weight": torch.cat((before, nothing, before, nothing)),
            f"{prefix}self_attn.k_proj.weight": torch.cat((constant, constant)),
            f"{prefix}self_attn.v_proj.weight": torch.cat((half * first, nothing)),
            f"{prefix}self_attn.o_proj.weight": torch.cat((swap * looks, torch.zeros(HIDDEN, 3 * HEAD_DIM)), 1),
            f"{prefix}mlp.gate_proj.weight": torch.ones(mlp_size, HIDDEN),
            f"{prefix}mlp.up_proj.weight": torch.ones(mlp_size, HIDDEN),
            f"{prefix}mlp.down_proj.weight": torch.zeros(HIDDEN, mlp_size),
        }
    shape = {
        "hidden_size": HIDDEN,
        "intermediate_size": mlp_size,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-9,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
    }
    model.mkdir(exist_ok=True)
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": num_layers, "eos_token_id": 0, **shape}
    (model / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, model / "model.safetensors")

    order = torch.randperm(VOCABULARY, generator=generator)
    own, hidden = torch.zeros(HEAD_DIM, HIDDEN), torch.zeros(HEAD_DIM, HIDDEN)
    # the second half of what projections read is the hidden state [a | b]; values are [e - a | a - b]
    new_token = torch.cat((half * first, -first), 1)
    kept_token = torch.cat((own, first - torch.eye(HIDDEN)[SIGNS:]), 1)
    self_query, self_key = torch.cat((constant, hidden), 1), torch.cat((constant, hidden), 1)
    to_first = torch.cat((torch.eye(SIGNS), torch.zeros(SIGNS, SIGNS)), 0)
    unused = torch.zeros(HIDDEN, HEAD_DIM)
    drafted = {
        "fc.weight": torch.cat((both, torch.zeros(HIDDEN, 2 * HIDDEN)), 1),
        f"{MIDLAYER}input_layernorm.weight": torch.ones(HIDDEN),
        f"{MIDLAYER}hidden_norm.weight": torch.ones(HIDDEN),
        f"{MIDLAYER}post_attention_layernorm.weight": torch.ones(HIDDEN),
        f"{MIDLAYER}self_attn.q_proj.weight": torch.cat([self_query] * 4),
        f"{MIDLAYER}self_attn.k_proj.weight": torch.cat([self_key] * 2),
        f"{MIDLAYER}self_attn.v_proj.weight": torch.cat((new_token, kept_token)),
        f"{MIDLAYER}self_attn.o_proj.weight": torch.cat((to_first, unused, swap, unused), 1),
        f"{MIDLAYER}mlp.gate_proj.weight": torch.ones(mlp_size, HIDDEN),
        f"{MIDLAYER}mlp.up_proj.weight": torch.ones(mlp_size, HIDDEN),
        f"{MIDLAYER}mlp.down_proj.weight": torch.zeros(HIDDEN, mlp_size),
        "norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": head[order],
        "d2t": order - torch.arange(VOCABULARY),
    }
    taps = {"eagle_aux_hidden_state_layer_ids": [1, 1, 0]} if num_layers == 2 else {}
    save_draft(draft, drafted, {"num_hidden_layers": 1, "draft_vocab_size": VOCABULARY, **shape, **taps})
