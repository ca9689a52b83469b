"""The decoder on a CPU: attention over blocks, sampling, and the runner of steps."""
