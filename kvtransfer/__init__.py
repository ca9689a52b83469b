"""KV blocks: their identity, their owners, the pool behind them, and how they move between workers.

Knows no model and no role.
"""
