"""Fakes that ship with the package: stand-ins for a device, a network or a store in tests and benchmarks."""
