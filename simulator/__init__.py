"""The whole system on a simulated clock: plan for a thousand GPUs on one core.

All decisions are made by the real code: the proxy's dispatcher, sessions, router and cluster view, the loops and
schedulers of the workers, their block managers, the I/O thread, its membership, and the transfer protocol, message by
message. Time is computed: a latency model replaces the model's step, a network with delays and bandwidths replaces
ZeroMQ and the data planes. Serving code does not import this package, and this package does not import torch.

Read `world` (the clock), `network` (lines and plane), `host` (one worker), `store` (a host's KV store),
`simulation` (all of it, one run), then the studies.
"""
