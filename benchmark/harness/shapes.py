"""Models of a given shape for random weights (`--load-format dummy`): a folder with the shape's config and a tokenizer.

With the demo model's tokenizer the vocabulary shrinks to that one's, so that every token that random weights draw is
text and can be streamed. With a tokenizer of the shape's own family the vocabulary is the shape's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from baton.node.modelhub import DEMO_MODEL, locate_model

SHAPES = Path(__file__).resolve().parents[1] / "shapes"
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
TAKEN_FROM_DEMO = ("vocab_size", "bos_token_id", "eos_token_id")


def shape_names() -> list[str]:
    return sorted(path.parent.name for path in SHAPES.glob("*/config.json"))


def make_model(shape: str, folder: Path, tokenizer: Path | None = None, layers: int | None = None) -> Path:
    """Write the model of `shape` into `folder`; returns the folder. `tokenizer`: a folder; None: the demo model's.
    layers: how many it has; None: those of the shape."""
    text_folder = tokenizer or locate_model(DEMO_MODEL)
    config = json.loads((SHAPES / shape / "config.json").read_text(encoding="utf-8"))
    if tokenizer is None:
        demo = json.loads((text_folder / "config.json").read_text(encoding="utf-8"))
        config |= {name: demo[name] for name in TAKEN_FROM_DEMO}
    if layers is not None:
        config["num_hidden_layers"] = layers
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for name in TEXT_FILES:
        if (text_folder / name).exists():
            shutil.copy(text_folder / name, folder / name)
    return folder


def block_bytes(folder: Path, block_tokens: int, dtype_bytes: int) -> int:
    """Size of one block of KV: keys and values, or latents, of every layer."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "kv_lora_rank" in config:
        row = config["kv_lora_rank"] + config["qk_rope_head_dim"]
        return int(config["num_hidden_layers"] * row * block_tokens * dtype_bytes)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim * block_tokens * dtype_bytes)
