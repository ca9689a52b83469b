"""Offline use: `LLM` for Python programs and `baton batch` for files, over the processes that `baton serve` starts.

It owns a private server and a client of its HTTP API; there is no second engine. Knows no tensors and no workers.
"""
