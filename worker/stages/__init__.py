"""A prefill worker as a pipeline of processes, each with some of the model's layers: the first one is the worker."""
