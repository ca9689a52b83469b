"""Blocks: layout, identity, their owners, the memory behind them, the table of one sequence's blocks."""
