"""Benchmarks: `load` tests any server with OpenAI's API, `gpu` and `host` parts of Baton, `cluster` whole clusters.

`harness` is what the latter three share. `baton bench` lists them all. The product imports none of them.
"""
