"""node.garbage: objects that exist after start-up are excluded from later collections."""

from __future__ import annotations

import gc

from baton.node.garbage import freeze_startup_objects


def test_startup_objects_are_not_scanned_again() -> None:
    """Guards against collector pauses of 0.1 s; objects that are created later are still collected."""
    here: list[object] = []
    try:
        freeze_startup_objects()
        assert not any(each is here for each in gc.get_objects())
        later: list[object] = []
        later.append(later)
        assert any(each is later for each in gc.get_objects())
    finally:
        gc.unfreeze()
