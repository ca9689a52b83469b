"""Quantised weights of checkpoints: which methods are read, how their tensors lie, and the numbers that they stand for.

`scheme` reads what config.json says of them and refuses by name what is not read; it imports no torch. `layouts` turns
the tensors of a module into a `QuantizedWeight` of `weight`, integers and scales in one form whatever wrote them. Where
a weight goes, and what multiplies by it, is the part of models.weights.
"""
