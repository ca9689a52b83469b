"""What a slot of a GPU may have room for, beside low-rank pairs of linear layers. All of it is memory of each slot, and
launches of each step with adapters, so a worker has it only where an option names it; a CPU has room for anything."""

from __future__ import annotations

VOCABULARY, WHOLES, LATENTS, ROUTERS, EXPERTS, MAGNITUDES = ROOMS = (
    "vocabulary",
    "modules_to_save",
    "kv_b_proj",
    "routers",
    "experts",
    "dora",
)
"""Pairs of the embedding and the head; whole copies of these and of norms; pairs of kv_b_proj of latent attention, of
routers and gates of shared experts, of routed experts; magnitudes."""
