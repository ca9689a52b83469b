"""Benchmarks of whole clusters on one machine."""
