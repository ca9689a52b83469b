"""What the collector looks through after a start."""

from __future__ import annotations

import gc

from baton.node.garbage import freeze_startup_objects


def test_what_is_there_is_not_looked_through_again() -> None:
    """Guards against pauses of a tenth of a second; what comes later is still collected."""
    here: list[object] = []
    try:
        freeze_startup_objects()
        assert not any(each is here for each in gc.get_objects())
        later: list[object] = []
        later.append(later)
        assert any(each is later for each in gc.get_objects())
    finally:
        gc.unfreeze()
