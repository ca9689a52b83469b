"""The floor that turns token ids and a block pool into next tokens: configurations, weights, the step, the sampler.

`batch` says what a step is made of. `layers` says what a layer is, and in which order its parts run; `sampling_rules`
what each sampling parameter asks of a draw. `cpu` and `cuda` carry both out over the ops of `kernels`, each with a
runner of steps. `config`, `weights` (with `checkpoint`, `sources` and `quantization`) and `fingerprint` read a Hugging
Face model folder. It knows no socket, no role and no owner of a block: the caller allocates the pool, hands out block
ids and decides which rows a step has.

`check`, `config`, `rope_config`, `folder`, `checkpoint`, `quantization.scheme`, `fingerprint`, `batch` and
`sampling_rules` import no torch.
"""
