"""A worker as a group of processes, each with a part of the model: rank 0 is the worker, which starts the others."""
