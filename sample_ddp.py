"""Sample images from a checkpoint to PNG files, an .npz file for evaluation and a grid.

    python sample_ddp.py --checkpoint runs/mine --out samples --num-samples 64 sampling.cfg_scale=4
    torchrun --nproc_per_node 8 sample_ddp.py --checkpoint runs/mine --out samples_50k --num-samples 50000

The files do not depend on the number of processes. To continue an interrupted run, repeat the command.
"""

import argparse

from fastdit.errors import friendly_exit


@friendly_exit()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run folder, or one of its checkpoints/step-*")
    parser.add_argument("--out", required=True, help="output folder")
    parser.add_argument("--num-samples", type=int, default=50_000)
    parser.add_argument("--labels", default="balanced", help="balanced, random, or class numbers like 207,360")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu, cuda:0, ... (default: this process's GPU if there is one)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()

    from fastdit.sampling import sample

    sample(
        arguments.checkpoint,
        arguments.out,
        arguments.num_samples,
        overrides=arguments.overrides,
        seed=arguments.seed,
        labels=arguments.labels,
        weights=arguments.weights,
        device=arguments.device,
    )


if __name__ == "__main__":
    main()
