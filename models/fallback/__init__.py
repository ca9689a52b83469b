"""Decoders that no code here describes, run through the transformers library over our paged pool.

Slower than native models, and admitted one by one: `admission` proves at load that all of a model's state is in keys
and values that go through the pool. transformers is imported in this package only, and only for such a model.
"""
