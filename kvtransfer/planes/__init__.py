"""Data planes: ways to move the bytes of blocks from one worker's pool into another's.

The receiver always writes its own memory.
"""
