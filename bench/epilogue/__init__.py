"""GELU in the epilogue of the MLP's products: candidates, measured by `python -m bench.epilogue`."""
