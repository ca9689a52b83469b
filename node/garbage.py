"""Python's garbage collector in a process whose users wait for tokens."""

from __future__ import annotations

import gc


def freeze_startup_objects() -> None:
    """Call it when all is started. What lives now lives to the end: the collector looks through it once more, and never
    again. With torch in memory such a look takes a tenth of a second, in which no token and no message moves."""
    gc.collect()
    gc.freeze()


def collect_rarely() -> None:
    """For a process whose live objects are many and whose garbage is not cyclic: by default the collector looks through
    all of them whenever a quarter is new, a tenth of a second for those of a thousand requests. What is new is looked
    through after 5,000 objects, in a millisecond; all, after ten million."""
    gc.set_threshold(5_000, 5, 400)
