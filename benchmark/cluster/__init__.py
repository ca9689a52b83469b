"""Measurements of a whole cluster on one machine."""
