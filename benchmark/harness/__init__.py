"""What benchmarks share: options, output, statistics, models of a given shape, child processes."""
