"""Benchmarks of parts of Baton on this machine's CPU and disk: a routing decision, model steps, disk tiers."""
