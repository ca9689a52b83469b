"""A model on a GPU over the kernels of `kernels.triton`. Imports triton: nothing on the CPU's path imports it.

`runner` launches steps, `launched` reads them; `slots` is what the GPU keeps of each sequence; `decoder` brings the
operations of a layer as launches of kernels, `products` chooses the kernel of each matrix product, `attention` that of
prompts; `graphs` captures decode steps for a ladder of batch sizes, `compiling` compiles a start's kernels ahead,
`chunks` lays prompts out, `memory` plans the pool, `queue` is the stream that all of it runs on.

Everything runs on CPU tensors too, where Triton interprets its kernels, so that host logic and arithmetic are tested.
"""
