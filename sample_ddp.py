"""Sample images from a checkpoint: the same as `fastdit sample`, with 50,000 images by default.

    python sample_ddp.py --checkpoint runs/mine --out samples --num-samples 64 sampling.cfg_scale=4
    torchrun --nproc_per_node 8 sample_ddp.py --checkpoint runs/mine --out samples_50k
"""

import sys

from fastdit.cli import main

if __name__ == "__main__":
    main(["sample", "--num-samples", "50000", *sys.argv[1:]])
