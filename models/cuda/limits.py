"""What one step on a GPU may hold, and which models its kernels compute."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from baton.kernels.triton.decode_plan import GROUP_ROWS
from baton.models.adapters.room import EXPERTS, LATENTS, MAGNITUDES, ROUTERS, VOCABULARY, WHOLES
from baton.models.config import ModelConfig
from baton.models.cuda.latent import check_latent
from baton.node.errors import SettingsError

MIXED_BESIDE_DRAFTS = 128
DRAFTED_TOKENS = 256
"""Of a decode step with drafts; with more, products take longer by as much as the tokens are more."""


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What one step may hold, and how it is computed."""

    max_rows: int
    max_tokens: int
    run_ahead: int = 1
    deterministic: bool = False
    """Results do not depend on what else is in the step, at a cost of up to a tenth of a step's time."""
    mixed_tokens: int | None = None
    """From so many tokens of prompts on, these and decode rows are one pass; None: always, but where there are drafts,
    which rows in such a pass do without."""
    most_drafts: int = 0
    """Drafts that are verified behind a row's token at most."""
    adapter_slots: int = 0
    """Adapters that the GPU holds at a time."""
    max_rank: int = 16
    """Of an adapter."""
    adapter_vocabulary: bool = False
    """Adapters may have pairs of the embedding and the head."""
    adapter_wholes: bool = False
    """Adapters may bring an embedding, a head and norms in place of the model's."""
    adapter_latents: bool = False
    """Adapters may have pairs of what makes keys and values of latents."""
    adapter_routers: bool = False
    """Adapters may have pairs of routers and of gates of shared experts."""
    adapter_experts: bool = False
    """Adapters may have pairs of routed experts."""
    adapter_magnitudes: bool = False
    """Adapters may scale what the model's own products make (DoRA)."""

    @property
    def least_mixed(self) -> int:
        """mixed_tokens, decided."""
        if self.mixed_tokens is not None:
            return self.mixed_tokens
        return MIXED_BESIDE_DRAFTS if self.most_drafts else 1

    @property
    def decode_tokens(self) -> int:
        """Tokens of a decode step at most, drafts included."""
        return max(self.max_rows, min(DRAFTED_TOKENS, self.max_rows * (1 + self.most_drafts)))

    @property
    def step_tokens(self) -> int:
        """Tokens of any step at most."""
        return max(self.max_tokens, self.decode_tokens)


def room_limits(room: Collection[str]) -> dict[str, bool]:
    """What `--lora-room` says, as arguments of StepLimits."""
    return {
        "adapter_vocabulary": VOCABULARY in room,
        "adapter_wholes": WHOLES in room,
        "adapter_latents": LATENTS in room,
        "adapter_routers": ROUTERS in room,
        "adapter_experts": EXPERTS in room,
        "adapter_magnitudes": MAGNITUDES in room,
    }


def check_supported(config: ModelConfig) -> None:
    """Raises SettingsError for what no kernel here computes, such as heads of some sizes."""
    if config.latent is not None:
        check_latent(config, config.latent)
        return
    if config.head_dim % 16 or config.head_dim > 256:
        raise SettingsError(f"head_dim {config.head_dim}: the GPU's attention needs a multiple of 16 up to 256")
    if config.group_size > GROUP_ROWS:
        raise SettingsError(f"{config.group_size} query heads share a key head; the GPU's attention takes {GROUP_ROWS}")
