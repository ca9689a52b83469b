"""How processes share a model: heads, rows of an MLP and tokens of the vocabulary among the ranks of a group, layers
among the stages of a pipeline, of which each is such a group.

Pure arithmetic on a configuration. Where the parts lie in a checkpoint is the part of models.allocation, and how the
ranks add up what they compute that of models.cpu.peers. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from baton.models.config import ModelConfig
from baton.node.errors import SettingsError

RANK_COUNTS = (1, 2, 4, 8)
MAX_STAGES = 8


@dataclass(frozen=True, slots=True)
class Rank:
    """One of the `count` ranks that hold a model together; rank 0 of 1 holds all of it.

    Heads and the MLP's width are cut, and experts dealt out whole, so that each rank computes a part of what a layer
    adds to the residual, and the parts are summed. The head is cut by tokens. Embedding, norms and routers every rank
    holds whole; a bias behind the sum only rank 0.
    """

    index: int = 0
    count: int = 1

    def share(self, total: int, what: str) -> range:
        """This rank's of `total` things; SettingsError if they cannot be shared out evenly."""
        if total % self.count:
            raise SettingsError(f"{total} {what} cannot be shared out to {self.count} ranks")
        size = total // self.count
        return range(self.index * size, (self.index + 1) * size)

    def key_heads(self, total: int) -> range:
        """This rank's key heads. Where there are fewer than ranks, several ranks hold the same one."""
        if self.count <= total or self.count % total:
            return self.share(total, "key heads")
        head = self.index * total // self.count
        return range(head, head + 1)

    def vocabulary(self, size: int) -> range:
        """The tokens whose logits this rank computes; the parts differ by at most one token."""
        if size < self.count:
            raise SettingsError(f"a vocabulary of {size} tokens cannot be shared out to {self.count} ranks")
        return range(self.index * size // self.count, (self.index + 1) * size // self.count)


WHOLE = Rank()


@dataclass(frozen=True, slots=True)
class Stage:
    """One of the `count` stages that a prompt's chunks pass one after the other; stage 0 of 1 has all layers.

    The first has the embedding, and the last one the final norm and the head.
    """

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

    def layers(self, total: int) -> range:
        """Those of this stage, of a model's `total`; numbers differ by at most one, and the first stages have more."""
        least, more = divmod(total, self.count)
        first = self.index * least + min(self.index, more)
        return range(first, first + least + (self.index < more))


ONLY_STAGE = Stage()


def part_of(config: ModelConfig, rank: Rank, stage: Stage = ONLY_STAGE) -> ModelConfig:
    """The heads and the tokens of one rank, and the layers of one stage, in the place of all: sizes of what it
    computes, not of what it loads, nor which layer is of which kind."""
    return replace(
        config,
        num_heads=len(rank.share(config.num_heads, "query heads")),
        num_kv_heads=len(rank.key_heads(config.num_kv_heads)),
        vocab_size=len(rank.vocabulary(config.vocab_size)),
        num_layers=len(stage.layers(config.num_layers)),
    )


def check_partition(config: ModelConfig, count: int) -> None:
    """SettingsError, with the numbers, if `count` ranks cannot share the model."""
    if count == 1:
        return
    if count not in RANK_COUNTS:
        raise SettingsError(f"--tp {count}: must be one of {', '.join(map(str, RANK_COUNTS))}")
    if config.through:
        raise SettingsError(f"{config.architecture} runs through transformers, on one rank only, and not on {count}")
    if config.qk_norm and config.whole_qk_norm:
        raise SettingsError(
            f"--tp {count}: {config.architecture} norms all heads of a token together, on one rank only"
        )
    for index in range(count):
        rank = Rank(index, count)
        rank.share(config.num_heads, "query heads")
        rank.key_heads(config.num_kv_heads)
        experts = config.experts
        if experts is None or not all(experts.layers):
            rank.share(config.intermediate_size, "rows of an MLP")
        if experts is not None:
            rank.share(experts.num_experts, "experts")
            rank.share(experts.shared_width, "rows of a shared expert")
        rank.vocabulary(config.vocab_size)


def check_stages(config: ModelConfig, count: int) -> None:
    """SettingsError, with the numbers, if a pipeline of `count` stages cannot have the model."""
    if count == 1:
        return
    if not 1 <= count <= MAX_STAGES:
        raise SettingsError(f"--pp {count}: must be from 1 to {MAX_STAGES}")
    if config.through:
        raise SettingsError(f"{config.architecture} runs through transformers, in one stage only, and not in {count}")
    if config.num_layers < count:
        raise SettingsError(f"{config.num_layers} layers cannot be shared out to {count} stages")
