"""The plan by which ranks of a group fill those of another: every unit and layer once, from a rank that has it."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest

from baton.kvtransfer.reshard import Cut, RankId, reshard
from baton.models.partition import Rank

MOST = 16
SIZES = [
    (units, source, target)
    for units, source, target in product(range(1, MOST + 1), repeat=3)
    if not max(units, source) % min(units, source) and not max(units, target) % min(units, target)
]
LAYERS = 5
Held = dict[tuple[RankId, int, int], tuple[int, int]]
"""By rank, unit and layer as the rank counts them: the unit and the layer of the model."""


def contents(cut: Cut) -> Held:
    return {
        (RankId(stage, rank), unit, layer): (cut.units(rank)[unit], layers[layer])
        for stage, layers in enumerate(cut.layers)
        for rank in range(cut.ranks)
        for unit in range(len(cut.units(rank)))
        for layer in range(len(layers))
    }


def moved(source: Cut, target: Cut, held: Held) -> Held:
    """What the target's ranks hold after the plan was carried out on what the source's hold."""
    filled: Held = {}
    for piece in reshard(source, target):
        for unit, layer in product(range(piece.num_units), range(piece.num_layers)):
            place = (piece.target, piece.target_unit + unit, piece.target_layer + layer)
            assert place not in filled, f"{place} is filled twice"
            filled[place] = held[piece.source, piece.source_unit + unit, piece.source_layer + layer]
    return filled


def test_every_size_fills_every_other_and_back():
    """Guards against head arithmetic that fails under replication: missing, doubled or swapped units."""
    assert len(SIZES) > 600
    for units, one, other in SIZES:
        first, second = Cut.even(units, one, 1), Cut.even(units, other, 1)
        there = moved(first, second, contents(first))
        assert there == contents(second), (units, one, other)
        assert moved(second, first, there) == contents(first), (units, one, other)


@pytest.mark.parametrize("stages", list(product(range(1, 5), repeat=2)), ids=str)
def test_stages_hand_over_their_layers(stages):
    """Guards against layers counted from the first of the model, and stages whose ends do not fall together."""
    for units, one, other in ((1, 2, 4), (2, 4, 1), (2, 1, 8), (8, 2, 4), (8, 4, 2)):
        first, second = Cut.even(units, one, LAYERS, stages[0]), Cut.even(units, other, LAYERS, stages[1])
        assert moved(first, second, contents(first)) == contents(second)
    uneven, even = Cut(2, 2, (range(0, 1), range(1, 4), range(4, LAYERS))), Cut.even(2, 4, LAYERS, stages[1])
    assert moved(uneven, even, contents(uneven)) == contents(even)


def test_ranks_with_the_same_unit_share_the_work():
    """Guards against one rank that sends all copies while its twins send none."""
    for units, one, other in SIZES:
        source, target = Cut.even(units, one, 1), Cut.even(units, other, 1)
        sent: Counter[tuple[int, int]] = Counter()
        for piece in reshard(source, target):
            first = source.units(piece.source.rank).start + piece.source_unit
            sent.update((unit, piece.source.rank) for unit in range(first, first + piece.num_units))
        for unit in range(units):
            loads = [sent[unit, rank] for rank in source.holders(unit)]
            assert max(loads) - min(loads) <= 1, (units, one, other, unit, loads)


def test_neighbouring_units_move_as_one_piece():
    """Guards against thousands of small copies where one would do."""
    assert len(reshard(Cut.even(8, 1, 3), Cut.even(8, 1, 3))) == 1
    pieces = reshard(Cut.even(8, 2, 3), Cut.even(8, 4, 3))
    moves = [(piece.source.rank, piece.target.rank, piece.num_units) for piece in pieces]
    assert moves == [(0, 0, 2), (0, 1, 2), (1, 2, 2), (1, 3, 2)]


def test_a_rank_holds_the_units_of_its_key_heads():
    """Guards against a plan and weights that disagree on which rank has which head."""
    for units, ranks, _ in SIZES:
        cut = Cut.even(units, ranks, 1)
        assert all(cut.units(index) == Rank(index, ranks).key_heads(units) for index in range(ranks))


def test_what_cannot_be_cut_is_an_error():
    with pytest.raises(ValueError, match="6 units on 4 ranks"):
        Cut.even(6, 4, 1)
    with pytest.raises(ValueError, match="3 layers in 4 stages"):
        Cut.even(2, 2, 3, stages=4)
    with pytest.raises(ValueError, match="each must begin"):
        Cut(2, 2, (range(0, 2), range(3, 4)))
    with pytest.raises(ValueError, match="2 units of 1 layers cannot become 4 of 1"):
        reshard(Cut.even(2, 1, 1), Cut.even(4, 1, 1))
