"""Shapes of benchmarks on GPUs."""

from baton.benchmark.gpu.runners import shape_config


def test_a_rank_has_its_part_of_a_shape():
    """Guards against a rank's step that is measured with the weights of another size."""
    whole, part = shape_config("llama-3.1-70b"), shape_config("llama-3.1-70b:8")
    assert (part.num_heads, part.num_kv_heads, part.intermediate_size, part.vocab_size) == (8, 1, 3584, 16032)
    assert (part.hidden_size, part.head_dim, part.num_layers) == (whole.hidden_size, 128, 80)
