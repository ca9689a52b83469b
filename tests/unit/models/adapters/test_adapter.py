"""What an adapter is on the host: sizes that count shared tensors once, products that it may change."""

from __future__ import annotations

from pathlib import Path

import torch

from baton.models.adapters.adapter import AdaptedProduct, Adapter, LayerAdapter, LowRank, adapted_products
from baton.models.config import ModelConfig

DEMO = Path(__file__).resolve().parents[4] / "models" / "demo"


def test_the_a_of_a_merged_product_counts_once() -> None:
    a = torch.zeros(4, 16)
    parts = tuple(LowRank(a, torch.zeros(8, 4)) for _ in range(3))
    adapter = Adapter(bytes(32), (LayerAdapter(qkv=parts),))
    assert adapter.rank == 4
    assert adapter.size_bytes == 4 * (4 * 16 + 3 * 8 * 4)


def test_an_adapter_without_pairs_has_rank_zero() -> None:
    assert Adapter(bytes(32), (LayerAdapter(),)).rank == 0


def test_products_have_the_shapes_of_the_weights() -> None:
    """An adapter is checked against these: a wrong order of the parts would put the key's into the value's rows."""
    config = ModelConfig.from_folder(DEMO)
    products = adapted_products(config)
    assert len(products) == config.num_layers
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    assert products[0]["qkv"] == AdaptedProduct(config.hidden_size, (query, key, key))
    assert products[0]["down"] == AdaptedProduct(config.intermediate_size, (config.hidden_size,))
