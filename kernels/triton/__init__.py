"""The GPU's version of the ops in `kernels`: one file a kernel, each with the formula, the bytes it moves and a checked
wrapper that writes into tensors of the caller's.

Imports triton, so nothing on the CPU path imports this package. Wrappers launch on the current CUDA stream, allocate
nothing and never synchronise, so that all of them can be captured in a CUDA graph. With `pdl` a kernel starts while
the one before it in the stream still runs, and waits for it before its first dependent load (programmatic dependent
launch); the one before must then be a kernel of ours with `pdl` too, or any other kernel, which simply ends first. It
gains up to 0.5 us a launch for a few rows, and costs up to a factor of two from some 200 rows on
(docs/benchmarks/kernels.md).
"""
