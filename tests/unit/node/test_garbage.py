"""node.garbage: objects that exist after start-up are excluded from later collections."""

from __future__ import annotations

import gc

from baton.node.garbage import collect_rarely, freeze_startup_objects


def test_startup_objects_are_not_scanned_again() -> None:
    """Guards against collector pauses of 0.1 s; objects that are created later are still collected."""
    here: list[object] = []
    freeze_startup_objects()  # all that tests have imported is excluded already, and stays so
    assert not any(each is here for each in gc.get_objects())
    later: list[object] = []
    later.append(later)
    assert any(each is later for each in gc.get_objects())


def test_live_objects_are_scanned_rarely_and_new_garbage_is_found() -> None:
    """Guards against pauses that grow with the number of requests, and against cycles that stay for ever."""
    before, scans = gc.get_threshold(), []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            scans.append(info["generation"])

    class Cycle:
        def __init__(self) -> None:
            self.me = self

    gc.collect()
    gc.callbacks.append(note)
    try:
        collect_rarely()
        live = [[number] for number in range(100_000)]
        assert 2 not in scans and 0 in scans
        number = len(gc.get_objects())
        for _ in range(100_000):
            Cycle()
        assert len(gc.get_objects()) < number + 50_000 and len(live) == 100_000
    finally:
        gc.callbacks.remove(note)
        gc.set_threshold(*before)
