"""Kernels timed on a GPU: `python -m bench.kernels`, `python -m bench.kernels.attention`."""
