"""Runs of blocks move what they were made of, in as few pieces as can be."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from baton.kvtransfer.blocks.runs import BlockRun, common_runs, cut, evenly_spaced


def test_runs_are_equal_at_both_ends_and_cut_checks_them() -> None:
    assert common_runs([1, 2, 3, 7], [4, 5, 9, 10]) == [BlockRun(1, 4, 2), BlockRun(3, 9, 1), BlockRun(7, 10, 1)]
    assert common_runs([3], [0]) == [BlockRun(3, 0, 1)]
    assert cut([1, 2, 3, 7], [2, 1, 1]) == [(1, 2), (3, 1), (7, 1)]
    assert cut([1, 2, 3, 7], [3, 1]) == [(1, 3), (7, 1)]
    for lengths in ([4], [2, 2], [3], [3, 1, 1], [3, 0, 1], []):
        assert cut([1, 2, 3, 7], lengths) is None


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12), st.integers(1, 3))
def test_runs_are_the_fewest_that_move_everything_in_order(pairs: list[tuple[int, int]], step: int) -> None:
    """Guards against blocks left out at either end of a run, and neighbours that move apart."""
    runs = common_runs([theirs for theirs, _ in pairs], [ours for _, ours in pairs], step)
    moved = [(run.source + step * i, run.target + step * i) for run in runs for i in range(run.length)]
    assert moved == pairs
    neighbours = sum((theirs + step, ours + step) == after for (theirs, ours), after in pairwise(pairs))
    assert len(runs) == len(pairs) - neighbours


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=12),
    st.lists(st.integers(1, 2), min_size=12, max_size=12),
    st.integers(1, 50),
)
def test_series_are_what_their_runs_are(places: list[tuple[int, int]], lengths: list[int], max_step: int) -> None:
    """Guards against rows of a copy that are left out, that overlap, or that lie further apart than CUDA copies."""
    runs = [BlockRun(*place, length) for place, length in zip(places, lengths, strict=False)]
    moved = []
    for first, count, *steps in evenly_spaced(runs, max_step):
        assert all(first.length <= step for step in steps) and (count == 1 or max(steps) <= max_step)
        moved += [
            BlockRun(first.source + i * steps[0], first.target + i * steps[1], first.length) for i in range(count)
        ]
    assert moved == runs


def test_even_steps_are_one_series() -> None:
    """Guards against a copy a block, where a rank needs some units of many blocks."""
    runs = [BlockRun(8 * block + 2, 2 * block, 2) for block in range(32)]
    assert evenly_spaced(runs, 100) == [(BlockRun(2, 0, 2), 32, 8, 2)]
    assert len(evenly_spaced(runs, 7)) == 32
    assert [series.num_runs for series in evenly_spaced([*runs, BlockRun(300, 64, 2), BlockRun(600, 66, 1)], 100)] == [
        32,
        1,
        1,
    ]
