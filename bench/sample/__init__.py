"""Sampled images per second: `python -m bench.sample`."""
