"""What trained networks are worth: `python -m bench.quality.variants`, `.fp8`, `.quickstart`."""
