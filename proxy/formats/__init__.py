"""Formats in which models write tool calls and reasoning: their tables, and the machine that reads them.

Pure: knows token ids, texts and the names of tools; no tokenizer, no HTTP, no engine.
"""
