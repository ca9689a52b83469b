"""Fast CPU versions of operations whose torch reference is in `kernels.reference`."""
