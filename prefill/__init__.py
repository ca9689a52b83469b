"""The prefill worker: a queue of prompts, computed in chunks under a budget, handed over. Knows no decode, no HTTP."""
