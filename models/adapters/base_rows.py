"""Rows of weights as a model's folder has them: for copies that an adapter brings, and for lengths of rows (DoRA)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from baton.models.adapters.modules import EMBEDDING, LM_HEAD
from baton.models.checkpoint import Checkpoint

BaseRows = Callable[[str, "list[int] | None"], "torch.Tensor | None"]
"""Rows of a weight of the model by its name in the checkpoint, [rows, inputs], or all; None: it is not known."""


def unknown_rows(name: str, rows: list[int] | None) -> torch.Tensor | None:
    """BaseRows of a model whose weights are made up."""
    return None


def rows_of_folder(folder: Path, tied: bool) -> BaseRows:
    """Of the folder's weights; `tied`: the head reads the embedding."""
    checkpoint = Checkpoint.open(folder)

    def rows(name: str, numbers: list[int] | None) -> torch.Tensor | None:
        stored = checkpoint.find(f"{EMBEDDING}.weight" if tied and name == f"{LM_HEAD}.weight" else name)
        if stored is None or not checkpoint.forms[stored.name].is_floating_point:
            return None
        with safe_open(folder / stored.file, framework="pt") as file:
            weight = file.get_slice(stored.name)
            return weight[:] if numbers is None else torch.cat([weight[number : number + 1] for number in numbers])

    return rows
