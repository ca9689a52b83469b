"""How attention of the rows that decode is planned, for one model, GPU and kind of steps. Launches nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from baton.kernels.triton.decode_attention import DecodeScratch
from baton.kernels.triton.decode_plan import FP8_AIM, DecodePlan, fixed_plan, queries_of, split_plan
from baton.models.config import ModelConfig
from baton.models.cuda.latent import plan_latent_rows
from baton.models.cuda.limits import StepLimits


@dataclass(frozen=True, slots=True)
class DecodePlans:
    """Plans by the number of tokens that decode; a pure function of its fields."""

    config: ModelConfig
    """Of a rank of several, its part_of."""
    limits: StepLimits
    num_sms: int
    quantised: bool
    """KV is of 8-bit floats."""

    def of_step(self, num_tokens: int, max_len: int) -> DecodePlan:
        """For tokens of sequences of up to max_len tokens."""
        kv_heads, deterministic = self.config.num_kv_heads, self.limits.deterministic
        if self.config.latent is not None:
            return plan_latent_rows(num_tokens, self.config.num_heads, max_len, self.num_sms, deterministic)
        queries = queries_of(self.config.group_size) if self.limits.most_drafts else 1
        if deterministic:
            return fixed_plan(num_tokens, kv_heads, max_len, self.num_sms, aim=self._aim, queries=queries)
        return split_plan(num_tokens, kv_heads, self.num_sms, self._aim, queries, self._part_elements)

    def of_drafts(self, num_rows: int) -> DecodePlan:
        """For a model that drafts, on whose sums no token depends."""
        return split_plan(num_rows, self.config.num_kv_heads, self.num_sms, self._aim, elements=self._part_elements)

    def scratch(self, plans: Iterable[DecodePlan], device: str) -> DecodeScratch:
        """Memory for any of these plans."""
        config, parts = self.config, max(plan.num_parts for plan in plans)
        dim = config.head_dim if config.latent is None else config.latent.latent_dim
        return DecodeScratch.make(self.limits.decode_tokens, parts, config.num_heads, config.num_kv_heads, dim, device)

    @property
    def _part_elements(self) -> int:
        group, dim = (1 << (size - 1).bit_length() for size in (self.config.group_size, self.config.head_dim))
        return group * dim

    @property
    def _aim(self) -> int:
        return FP8_AIM if self.quantised else 1
