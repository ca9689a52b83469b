"""Blocks: layout, identity, who owns them, the memory behind them, the table of one sequence's blocks."""
