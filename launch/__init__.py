"""How Baton is started: the supervisor of child processes, and what `serve` starts on one machine."""
