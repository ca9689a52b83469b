"""A model on a GPU over the kernels of `kernels.triton`. Imports triton: nothing on the CPU's path imports this package.

`runner` launches steps and keeps the books of what the GPU has in its slots (`slots`); `decoder` is the model's layers as
launches of kernels, `products` chooses the kernel of each matrix product, `graphs` captures decode steps for a ladder of
batch sizes, `chunks` lays prompts out, `memory` plans what goes where, `queue` is the stream that all of it runs on.

Everything runs on CPU tensors too where Triton interprets its kernels: so are the tests of the books and of the arithmetic.
"""
