"""Train a diffusion transformer on the latents that extract_features.py wrote.

    python train.py --config configs/dit_s_2.yaml data.shards=data/my_latents run_dir=runs/mine
    torchrun --nproc_per_node 8 train.py --config configs/dit_xl_2.yaml
    deepspeed train.py --config configs/dit_xl_2.yaml training.zero_stage=2

Any value of the config can follow as section.key=value. --resume goes on from the newest checkpoint in run_dir, or
starts where there is none.
"""

import argparse

from fastdit.config import load_config
from fastdit.errors import friendly_exit


@friendly_exit()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file of configs/")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in run_dir")
    parser.add_argument("--device", help="cpu, cuda:0, ...; the GPU of this process where there is one")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)

    from fastdit.training.loop import train  # torch takes seconds to import: a misspelt key fails before

    train(config, resume=arguments.resume, device=arguments.device)


if __name__ == "__main__":
    main()
