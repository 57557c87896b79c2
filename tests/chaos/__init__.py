"""Fault injection: each module breaks something on purpose and counts what went wrong. `make chaos` runs them all."""
