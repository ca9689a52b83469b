"""The prefill worker: a queue of prompts, computed in chunks under a token budget, handed over. Knows no decode, no HTTP."""
