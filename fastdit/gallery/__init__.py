"""Pictures of what a run samples, and of any folder of images: labelled sheets, trajectories, interpolations.

cells.py samples, axes.py says what varies, pages.py arranges, folders.py shows images from files.
"""

# the options of each axis; the first axis that varies becomes the rows
OPTIONS = {"class": "classes", "seed": "seeds", "guidance": "cfg_scale", "steps": "steps", "sampler": "samplers",
           "checkpoint": "checkpoints"}  # fmt: skip
KEYS = {"guidance": "sampling.cfg_scale", "steps": "sampling.steps", "sampler": "sampling.sampler"}
