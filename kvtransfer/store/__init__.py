"""The host's KV store: a RAM arena that all workers of a host share, what lies under it, and the workers' side of it.

No torch: the store is a process of its own, and what a worker runs of it moves bytes only.
"""
