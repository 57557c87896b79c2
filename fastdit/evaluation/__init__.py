"""Distances and scores of generated images: features, metrics, and results that carry their protocol."""
