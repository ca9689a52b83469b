"""python -m baton.kernels.triton FOLDER: one of the processes of `compiling.compile_all`, which made the folder."""

from __future__ import annotations

import sys

from baton.kernels.triton.compiling import compile_in_turn

if __name__ == "__main__":
    compile_in_turn(*sys.argv[1:])
