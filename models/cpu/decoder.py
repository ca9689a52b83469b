"""The one dense decoder of all families: token ids of a step in, logits of the rows that draw out.

What differs between Llama, Mistral, Qwen2 and Qwen3 is data: biases and norms that are there or not (weights), rope and
window (config). Formula a layer, with pre-norm residuals:  h += O(attention(norm(h)));  h += down(silu(gate) * up).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from baton import kernels
from baton.models.config import ModelConfig
from baton.models.cpu.attention import PagedAttention
from baton.models.cpu.step_batch import StepBatch
from baton.models.rope import rotations
from baton.models.weights import LayerWeights, Weights


def forward(
    config: ModelConfig, weights: Weights, frequencies: torch.Tensor, attention: PagedAttention, step: StepBatch
) -> torch.Tensor:
    """float32 logits [drawn rows, vocab]; keys and values of all tokens are in the pool afterwards."""
    rope = rotations(step.positions, frequencies, config.rope.attention_factor, weights.embedding.dtype)
    residual = F.embedding(step.token_ids, weights.embedding)  # [N, hidden]
    mixed = torch.zeros_like(residual)
    for index, layer in enumerate(weights.layers):
        normed, residual = kernels.add_rms_norm(mixed, residual, layer.input_norm, config.rms_norm_eps)
        query, kv = _project(config, layer, normed, rope)
        attended = layer.o(attention(index, query, kv, step))
        normed, residual = kernels.add_rms_norm(attended, residual, layer.post_norm, config.rms_norm_eps)
        gated = kernels.silu_and_mul(layer.gate_up(normed))
        mixed = layer.down(gated)
    if step.drawn_tokens is not None:
        mixed, residual = mixed[step.drawn_tokens], residual[step.drawn_tokens]
    normed, _ = kernels.add_rms_norm(mixed, residual, weights.norm, config.rms_norm_eps)
    return weights.lm_head(normed).float()


def _project(
    config: ModelConfig, layer: LayerWeights, normed: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated queries [N, num_heads, head_dim]; rotated keys and values [N, 2, num_kv_heads * head_dim]."""
    qkv = layer.qkv(normed)
    rotated = config.num_heads + config.num_kv_heads
    heads = qkv.view(len(qkv), -1, config.head_dim)  # [N, num_heads + 2 num_kv_heads, head_dim]
    query_key = heads[:, :rotated]
    if layer.qk_norm is not None:
        query_key.copy_(kernels.rms_norm(query_key, layer.qk_norm, config.rms_norm_eps))
    kernels.apply_rope(query_key, *rope)
    return heads[:, : config.num_heads], qkv[:, config.num_heads * config.head_dim :].view(len(qkv), 2, -1)
