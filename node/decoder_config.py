"""The decoder in the config.json of a model that sees images too: it is served as a model of text alone.

Such a file nests the decoder's keys in `text_config`, or, in older ones, has them beside the `vision_config`. Positions
of text have one number, so Qwen's rotations by three numbers are the usual ones. Source: transformers'
`get_text_config`, and its configuration classes for what published files leave out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

WITH_IMAGES = frozenset(
    (
        "Gemma3ForConditionalGeneration",
        "LlavaForConditionalGeneration",
        "Mistral3ForConditionalGeneration",
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
    )
)
"""Names in `architectures`; without images these compute what their decoder does."""
_DECODERS = {
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
}
"""The `model_type` of the same decoder in a model of text."""
_ABSENT: Mapping[str, Mapping[str, Any]] = {
    "gemma3_text": {"num_attention_heads": 8, "vocab_size": 262208, "max_position_embeddings": 131072}
}
"""What files leave out, by `model_type`."""
_OF_WHOLE = ("eos_token_id", "tie_word_embeddings", "quantization_config", "compression_config")
"""Keys that count where they stand beside `text_config`."""

Value = TypeVar("Value")


def decoder_config(config: dict[str, Value]) -> dict[str, Value]:
    """The keys of the decoder; those of a model of text are all."""
    names = config.get("architectures")
    if not (isinstance(names, list) and len(names) == 1 and names[0] in WITH_IMAGES):
        return config
    nested = config.get("text_config")
    found: dict[str, Any] = {**nested} if isinstance(nested, dict) else {**config}
    kind = found.get("model_type")
    if isinstance(kind, str):
        found = {**_ABSENT.get(kind, {}), **found, "model_type": _DECODERS.get(kind, kind)}
    found |= {key: config[key] for key in _OF_WHOLE if config.get(key) is not None}
    found.pop("architectures", None)
    return found
