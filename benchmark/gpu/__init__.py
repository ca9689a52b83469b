"""Measurements of kernels, steps, planes and start-up on a GPU."""
