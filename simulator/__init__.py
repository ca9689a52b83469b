"""The whole system on a simulated clock: plan for a thousand GPUs on one core.

What decides is the real code: the proxy's dispatcher, sessions, router and cluster view, the loops and schedulers of
the workers, their block managers, the I/O thread, its membership, and the transfer protocol, message by message. What
takes time is arithmetic: a latency model stands in for the model's step, a network with delays and bandwidths for
ZeroMQ and the data planes. Nothing here is imported by what serves, and nothing here imports torch.

Read `world` (the clock), `network` (lines and plane), `host` (one worker), `store` (a host's KV store),
`simulation` (all of it, one run), then the studies.
"""
