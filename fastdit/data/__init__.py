"""Images to pixels, pixels to moments, moments to shards, and shards to batches."""
