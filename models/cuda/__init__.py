"""A model on a GPU over the kernels of `kernels.triton`. Imports triton: nothing on the CPU's path imports it.

`runner` launches steps and keeps the books of what the GPU has in its slots (`slots`); `decoder` is the model's layers
as launches of kernels, `products` chooses the kernel of each matrix product, `attention` that of prompts, `graphs`
captures decode steps for a ladder of batch sizes, `compiling` has the kernels of a start compiled before, `chunks` lays
prompts out, `memory` plans the pool, `queue` is the stream that all of it runs on.

Everything runs on CPU tensors too, where Triton interprets its kernels: so the books and the arithmetic are tested.
"""
