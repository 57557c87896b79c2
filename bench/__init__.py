"""Benchmarks. Run them from the repository root, as `python -m bench.step`; bench/README.md lists them."""
