"""The kernels that lay out, accept and propose drafts."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.tests.unit.kernels.draft_checks import check_offered, check_step


@pytest.mark.parametrize("seed", range(6))
def test_a_step_of_drafts(device, seed):
    """Guards against a draft at another place, one accepted that was not drawn, tokens beyond a sequence's limit, and
    drafts other than those of the longest match."""
    check_step(device, seed, spare=(0, 3, 7, 40)[seed % 4])


def test_a_text_that_several_programs_compare(device):
    """Guards against a match that only the part of one program has, and a counter that is not set back."""
    check_step(device, 7, searched=2500, answered=600)


@pytest.mark.parametrize("seed", range(2))
def test_forced_tokens_before_other_drafts(device, seed):
    """Guards against forced tokens at another place than where the sequence is by now, behind tokens that were not
    drawn, and in place of drafts that begin with them; and against other drafts for the host than for the step."""
    check_offered(device, seed)
