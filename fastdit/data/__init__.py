"""Images to pixels, pixels to latent moments, moments to shards and back to batches."""
