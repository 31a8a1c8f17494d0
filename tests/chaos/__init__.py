"""A job on the real cluster, killed again and again: ``make chaos``."""
