"""Fakes that ship: what stands in for a device, a network or a store in tests and benchmarks."""
