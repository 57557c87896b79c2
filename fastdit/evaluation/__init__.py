"""Feature extraction and distances between sets of images."""
