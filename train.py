"""Train a diffusion transformer on latents from extract_features.py.

    python train.py --config configs/dit_s_2.yaml data.shards=data/my_latents run_dir=runs/mine
    torchrun --nproc_per_node 8 train.py --config configs/dit_xl_2.yaml
    deepspeed train.py --config configs/dit_xl_2.yaml training.zero_stage=2

section.key=value overrides a value of the config. --resume continues from the latest checkpoint in run_dir; if there
is none, training starts from the beginning.
"""

import argparse

from fastdit.config import load_config
from fastdit.errors import friendly_exit


@friendly_exit()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, such as those in configs/")
    parser.add_argument("--resume", action="store_true", help="continue from the latest checkpoint in run_dir")
    parser.add_argument("--device", help="cpu, cuda:0, ... (default: this process's GPU if there is one)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)

    from fastdit.convert import read_initial
    from fastdit.training.loop import train  # after load_config: importing torch takes seconds

    train(config, resume=arguments.resume, device=arguments.device, read_initial=read_initial)


if __name__ == "__main__":
    main()
