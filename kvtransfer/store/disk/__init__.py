"""Tiers below the pools: places where whole blocks rest under their hash. Pure storage: no request, no route, no torch.

`base` is what callers know; `tier` is the one policy (LRU, quota, faults are misses) over a storage of records.
"""
