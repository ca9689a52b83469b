"""The decode worker: reservations, continuous batching, preemption, streams of tokens. Knows no prefill, no HTTP."""
