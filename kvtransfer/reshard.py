"""Which pieces of KV a group of ranks gets from which rank of another group, whatever the sizes of the two. Pure.

A group holds the KV of a model in parts. Its stages share the layers, and the ranks of a stage share the units (KV
heads). With fewer units than ranks several ranks hold the same unit. A piece is a run of whole units, in a range of
layers, that one rank has and another one needs; each unit is contiguous at both ends (blocks.layout), so a piece needs
no gather.

    8 units, 2 ranks to 4:    0 -> 0 units 0-1    0 -> 1 units 2-3    1 -> 2 units 4-5    1 -> 3 units 6-7
    2 units, 4 ranks to 2:    0 -> 0 unit 0       2 -> 1 unit 1       (1 and 3 hold copies and send nothing)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple


class RankId(NamedTuple):
    """A rank of a group."""

    stage: int
    rank: int


class Piece(NamedTuple):
    """Units and layers that move from one rank to another; numbers count from the first that the rank holds."""

    source: RankId
    target: RankId
    source_unit: int
    target_unit: int
    num_units: int
    source_layer: int
    target_layer: int
    num_layers: int


@dataclass(frozen=True, slots=True)
class Cut:
    """How a group holds the KV of a model: `ranks` in each stage, one range of layers a stage."""

    total_units: int
    ranks: int
    layers: tuple[range, ...]

    def __post_init__(self) -> None:
        large, small = max(self.total_units, self.ranks), min(self.total_units, self.ranks)
        if small < 1 or large % small:
            raise ValueError(f"{self.total_units} units on {self.ranks} ranks: one number must divide the other")
        ends = [0, *(layers.stop for layers in self.layers)]
        if len(ends) < 2 or any(
            layers.start != end or not layers for layers, end in zip(self.layers, ends, strict=False)
        ):
            raise ValueError(f"stages of layers {self.layers}: each must begin where the one before it ends")

    @classmethod
    def even(cls, total_units: int, ranks: int, num_layers: int, stages: int = 1) -> Cut:
        """With stages whose numbers of layers differ by at most one, the longer ones first."""
        if not 1 <= stages <= num_layers:
            raise ValueError(f"{num_layers} layers in {stages} stages")
        least, more = divmod(num_layers, stages)
        ends = accumulate((least + (stage < more) for stage in range(stages)), initial=0)
        return cls(total_units, ranks, tuple(range(first, end) for first, end in pairwise(ends)))

    @property
    def num_layers(self) -> int:
        return self.layers[-1].stop

    def units(self, rank: int) -> range:
        """The units that a rank of each stage holds."""
        if self.ranks > self.total_units:
            unit = rank * self.total_units // self.ranks
            return range(unit, unit + 1)
        count = self.total_units // self.ranks
        return range(rank * count, (rank + 1) * count)

    def holders(self, unit: int) -> range:
        """The ranks of each stage that hold a unit."""
        if self.ranks <= self.total_units:
            rank = unit * self.ranks // self.total_units
            return range(rank, rank + 1)
        copies = self.ranks // self.total_units
        return range(unit * copies, (unit + 1) * copies)


def reshard(source: Cut, target: Cut) -> tuple[Piece, ...]:
    """What fills every rank of `target`, each unit and layer once; in the order of targets.

    Where several ranks hold a unit, those that need it are spread over them. ValueError for cuts of different models.
    """
    if (source.total_units, source.num_layers) != (target.total_units, target.num_layers):
        raise ValueError(
            f"{source.total_units} units of {source.num_layers} layers cannot become "
            f"{target.total_units} of {target.num_layers}"
        )
    pieces = []
    for to_stage, needed in enumerate(target.layers):
        for rank in range(target.ranks):
            for from_stage, held in enumerate(source.layers):
                layers = range(max(held.start, needed.start), min(held.stop, needed.stop))
                if layers:
                    pieces += [
                        Piece(
                            RankId(from_stage, from_rank),
                            RankId(to_stage, rank),
                            units.start - source.units(from_rank).start,
                            units.start - target.units(rank).start,
                            len(units),
                            layers.start - held.start,
                            layers.start - needed.start,
                            len(layers),
                        )
                        for from_rank, units in _sources(source, target, rank)
                    ]
    return tuple(pieces)


def _sources(source: Cut, target: Cut, rank: int) -> Iterator[tuple[int, range]]:
    """The ranks that a target's rank gets its units from, each with a run of them."""
    run, run_from = range(0), -1
    for unit in target.units(rank):
        holders = source.holders(unit)
        holder = holders[target.holders(unit).index(rank) % len(holders)]
        if run and holder == run_from:
            run = range(run.start, unit + 1)
            continue
        if run:
            yield run_from, run
        run, run_from = range(unit, unit + 1), holder
    yield run_from, run
