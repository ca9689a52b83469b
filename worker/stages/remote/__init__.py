"""Stages of a prefill worker on other hosts: they share no memory with the first, and join it over links with keys."""
