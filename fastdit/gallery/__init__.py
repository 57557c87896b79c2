"""Pictures of what a run samples, and of any folder of images: labelled sheets, trajectories, interpolations.

cells.py samples, axes.py says what varies, pages.py arranges, folders.py shows images from files.
"""
