"""The floor that turns token ids and a block pool into next tokens: configurations, weights, the step, the sampler.

Read it from the top down: `runner` carries one step out (`batch` says what a step is made of), `decoder` is the one
dense decoder of all supported families over the ops of `kernels`, `attention` lays the rows of a step over the paged
pool, `sampler` draws; `cuda` is the same for a GPU. `config`, `weights` and `fingerprint` read a Hugging Face model
folder. It knows no socket, no role and no owner of a block: the caller allocates the pool, hands out block ids and
decides which rows a step has.

`config`, `rope_config`, `folder`, `fingerprint` and `batch` import no torch.
"""
