"""The settings of a decode worker, and the sizes that follow from them on a device."""

from __future__ import annotations

from dataclasses import dataclass

from baton.models.config import FULL_STEP_TOKENS
from baton.node.counters import MOST_DRAFTS
from baton.node.messages.base import Role
from baton.node.settings import option
from baton.worker.settings import WorkerSettings, WorkerSizes

"""More would rarely all be accepted."""


@dataclass(frozen=True, slots=True)
class DecodeSizes:
    """Sizes of a decode worker on its device: as given, else the device's defaults."""

    worker: WorkerSizes
    max_chunk_tokens: int
    full_step_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSettings(WorkerSettings):
    max_chunk_tokens: int | None = option(
        None,
        unit="tokens",
        help="longest chunk of a prompt in a step, beside decode rows; default 128, on a GPU 2048",
        minimum=1,
    )
    full_step_tokens: int | None = option(
        None,
        unit="tokens",
        help="stop adding prompts to a step beyond this many of their tokens: fewer make the pauses of answers shorter "
        "and more frequent; default: as many as a step holds, of a mixed worker on a GPU 1024",
        minimum=1,
    )
    mixed: bool = option(
        False,
        help="also compute prompts for other workers, by a share that follows the load; mixed workers exchange KV only "
        "with one another (`baton serve --roles adaptive` starts them)",
    )
    spare_blocks: int = option(
        4, unit="blocks", help="blocks that a reservation must leave free for running sequences to grow", minimum=0
    )

    speculate_tokens: int = option(
        7, unit="tokens", help="most tokens that are guessed for a sequence in a step", minimum=1, maximum=MOST_DRAFTS
    )

    @property
    def most_drafts(self) -> int:
        """Drafts that a step verifies for one sequence at most; 0: none."""
        return 0 if self.speculate == "off" else self.speculate_tokens

    @property
    def draft_reach(self) -> int:
        """Places behind the drafts of a step that are written while the next ones are proposed."""
        return 0 if self.draft_model is None else self.speculate_tokens - 1

    @property
    def role(self) -> Role:
        """The role that the worker registers for."""
        return "mixed" if self.mixed else "decode"

    def sizes(self, device: str) -> DecodeSizes:
        """The sizes on "cpu" or "cuda"."""
        worker = self.worker_sizes(device)
        full_tokens = FULL_STEP_TOKENS if self.mixed and device == "cuda" else worker.max_num_batched_tokens
        chunk_tokens = self.max_chunk_tokens or (128 if device == "cpu" else 2048)
        return DecodeSizes(worker, chunk_tokens, self.full_step_tokens or full_tokens)
