"""Compiles a few kernels for sm_90 in processes, then launches them here; run as a process of its own, without a GPU.

Prints one JSON line: how many kernels there were, how many were missing before and after, and for each that a launch
looked for on disk whether it was there. An argument names a module that the processes import beside the kernels', which
are few then.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

from triton import knobs
from triton.runtime import driver

from baton.kernels.triton.compiling import compile_all, launched_by, missing
from baton.tests.unit.kernels import compile_sm90

TIMEOUT_S = 1500.0
"""None, as far as a busy machine is concerned: the test that starts this has the limit."""


def few_launches() -> None:
    compile_sm90.small_kernels()


def launches() -> None:
    few_launches()
    compile_sm90.decode(32, 8, 128, 64, compile_sm90.PARTS, pdl=True)
    compile_sm90.decode(32, 8, 128, 64, compile_sm90.PARTS, pdl=True)
    compile_sm90.gated_product()


def main() -> None:
    driver.set_active(compile_sm90.NoDevice())
    run = few_launches if sys.argv[1:] else launches
    wanted = launched_by(run)
    absent = missing(wanted)
    more = [replace(wanted[-1], module=module) for module in sys.argv[1:]]
    compile_all([*more, *wanted], 2, TIMEOUT_S)
    still = missing(wanted)
    hits: list[bool] = []
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    compile_sm90.compile_instead_of_launching()
    run()
    print(json.dumps({"wanted": len(wanted), "absent": len(absent), "still": len(still), "hits": hits}))


if __name__ == "__main__":
    main()
