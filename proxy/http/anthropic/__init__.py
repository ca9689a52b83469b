"""Anthropic's Messages API: its request bodies, its answers and streams, and its errors. Knows no engine."""
