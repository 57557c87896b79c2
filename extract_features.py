"""Encode images to latent shards: the same as `fastdit extract`.

    python extract_features.py --images DIR --out DIR --vae NAME_OR_DIR --image-size 256
    torchrun --nproc_per_node 8 extract_features.py ...     the same files, eight times as fast
"""

import sys

from fastdit.cli import main

if __name__ == "__main__":
    main(["extract", *sys.argv[1:]])
