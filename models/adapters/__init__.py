"""Low-rank adapters of a model: what they are, how a folder of PEFT is read, and where a runner keeps them.

An adapter is its content: a digest names it everywhere but in the proxy, which knows names. `adapter` describes one on
the host, `slots` what a runner offers for them. It knows no worker, no request and no path but the one it reads.
"""
