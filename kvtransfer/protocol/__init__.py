"""The transfer protocol: state machines of sender and receiver, and the exchange that runs them over a data plane."""
