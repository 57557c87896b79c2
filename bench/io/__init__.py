"""Reading and writing latents: `python -m bench.io.loader`, `python -m bench.io.extract`."""
