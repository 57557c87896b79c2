"""What can be counted or predicted without a GPU: `python -m bench.static.count`, `.kernels`, `.plans`."""
