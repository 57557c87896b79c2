"""Training steps per second: `python -m bench.step`."""
