"""Train a diffusion transformer on latents: the same as `fastdit train`, for torchrun and the deepspeed launcher.

    python train.py --config configs/dit_s_2.yaml data.shards=data/my_latents run_dir=runs/mine
    torchrun --nproc_per_node 8 train.py --config configs/dit_xl_2.yaml
    deepspeed train.py --config configs/dit_xl_2.yaml training.zero_stage=2
"""

import sys

from fastdit.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
