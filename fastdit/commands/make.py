"""From images to samples: extract, train, train-vae, sample, quickstart and launch.

Each function adds its arguments to a parser and returns what runs it.
"""

import argparse
import os
import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

from fastdit.autoencoder.config import AutoencoderConfig
from fastdit.commands.arguments import DEVICE, Command, one_name, processes, take_words, values
from fastdit.commands.look import default_out, make_picture, take_pictures, wants_picture
from fastdit.config import check_alone, is_shipped, load_config
from fastdit.errors import counted

LAUNCHED = ("extract", "train", "train-vae", "sample", "evaluate", "neighbors")  # commands that several processes share


def extract(parser: ArgumentParser) -> Command:
    """Encode images to latent shards.

    Any number of processes writes the same files: fastdit launch --gpus 8 extract --images DIR --out DIR --vae VAE
    After an interruption, the same command keeps the shards that were finished.
    With --encoder, a frozen encoder's features follow in OUT/features, for training.align=repa. If OUT already has the
    latents of these images, only the features are added.
    """
    parser.add_argument(
        "--images",
        required=True,
        help="a folder with a subfolder per class, a folder of images, a CSV or JSONL file with path and label, a "
        "WebDataset, ImageNet's or CIFAR's archive (cifar-10-python.tar.gz/test: its test images), or Parquet files of "
        "the Hugging Face hub",
    )
    parser.add_argument("--out", required=True, help="output folder; it appears once it is complete")
    parser.add_argument(
        "--vae",
        required=True,
        help="AutoencoderKL or AutoencoderDC: a local folder or a hub name; none: latents are the pixels",
    )
    parser.add_argument("--image-size", default="256", help="center crop in pixels: a side, or WIDTHxHEIGHT (256)")
    parser.add_argument("--batch-size", type=int, default=32, help="images per batch and process (32)")
    parser.add_argument("--dtype", help="storage of latents: float16 (default) or float32")
    parser.add_argument("--precision", help="of the VAE and of --encoder: float32, bfloat16 (default on a GPU from "
                        "Ampere on) or float16")  # fmt: skip
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                        help="compile the encoder (default: on a GPU, for 10,000 images or more)")  # fmt: skip
    parser.add_argument("--adm-exact", action="store_true",
                        help="read images as ADM and DiT: EXIF, transparency and 16 bits not handled")  # fmt: skip
    parser.add_argument("--workers", type=int, help="decoding threads per process (default: its share of the cores)")
    parser.add_argument("--shard-size", type=int, help="images per shard (2048)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it holds latents")
    parser.add_argument("--encoder", metavar="NAME[=PATH]",
                        help="dinov2=FOLDER or dinov3=FOLDER (transformers), or efficientnet-lite0")  # fmt: skip
    parser.add_argument("--feature-dtype", help="storage of features: float16 (default) or int8")
    parser.add_argument("--device", help=DEVICE)
    options = [action.dest for action in parser._actions if action.dest not in ("help", "device", "encoder")]

    def run(arguments: Namespace) -> None:
        if arguments.feature_dtype and not arguments.encoder:
            raise ValueError(f"--feature-dtype={arguments.feature_dtype} is for the features of --encoder; give that")
        arguments.feature_dtype = arguments.feature_dtype or "float16"
        from fastdit.data.extract import extract_features

        with processes(arguments) as ranks:
            encoder = None
            if arguments.encoder:
                from fastdit.evaluation.encoders import load_encoder

                encoder = load_encoder(arguments.encoder, ranks.device)
            extract_features(**values(arguments, options), encoder=encoder, ranks=ranks)

    return run


def train(parser: ArgumentParser) -> Command:
    """Train a network on latents.

    fastdit train sit_s_2 data.shards=latents run_dir=runs/mine training.epochs=100 training.ema_warmup=true
    CONFIG is a YAML file, or the name of an included config (fastdit configs). Repeat the command with --resume to
    continue; if the run folder does not exist, training starts from the beginning.
    """
    parser.add_argument("--config", help="the same as CONFIG")
    parser.add_argument("--resume", action="store_true", help="continue from the latest checkpoint in run_dir")
    parser.add_argument("--images", help="train on these images: their latents are extracted to data.shards, or to a "
                        "folder beside them, unless they are there from an earlier command")  # fmt: skip
    parser.add_argument("--device", help=DEVICE)
    parser.add_argument("--help-config", action="store_true", help="list every config key and exit")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    take_words(parser, "CONFIG")

    def run(arguments: Namespace) -> None:
        if arguments.help_config:
            from fastdit.listings import keys

            return print(keys())
        started = time.monotonic()
        name = one_name(arguments, "config", "config, such as sit_s_2")
        config = load_config(name, arguments.overrides)

        from fastdit.convert import read_initial
        from fastdit.report import report_at_end
        from fastdit.training.loop import train  # after load_config: importing torch takes seconds

        if arguments.images:
            from fastdit.api import with_latents

            named = any(override.startswith("data.shards=") for override in arguments.overrides)
            place = config.data.shards if named or not is_shipped(name) else ""  # that of an included one is an example
            config = with_latents(config, arguments.images, place, arguments.device)
        train(config, resume=arguments.resume, device=arguments.device, read_initial=read_initial, report=report_at_end,
              started=started)  # fmt: skip

    return run


def train_vae(parser: ArgumentParser) -> Command:
    """Train an autoencoder on images.

    fastdit train-vae vae_kl_f4 data.images=images run_dir=runs/vae
    CONFIG is a YAML file, or the name of an included config (fastdit configs). The result is RUN/vae, for extract,
    train and sample; RUN/report.html shows it. Repeat the command with --resume to continue. Several GPUs:
    fastdit launch --gpus 8 train-vae ...
    """
    parser.add_argument("--config", help="the same as CONFIG")
    parser.add_argument("--resume", action="store_true", help="continue from the latest checkpoint in run_dir")
    parser.add_argument("--device", help=DEVICE)
    parser.add_argument("--help-config", action="store_true", help="list every config key and exit")
    take_words(parser, "CONFIG")
    parser.set_defaults(schema=AutoencoderConfig)

    def run(arguments: Namespace) -> None:
        if arguments.help_config:
            from fastdit.listings import keys

            return print(keys(AutoencoderConfig))
        name = one_name(arguments, "config", "config, such as vae_kl_f4")
        config = load_config(name, arguments.overrides, AutoencoderConfig)
        from fastdit.autoencoder.loop import train_autoencoder  # after load_config: importing torch takes seconds
        from fastdit.report import report_at_end

        train_autoencoder(config, resume=arguments.resume, device=arguments.device, report=report_at_end)

    return run


def sample(parser: ArgumentParser) -> Command:
    """Sample images from a run to PNG files, an .npz file for evaluation and a grid.

    fastdit sample runs/mine --out samples --num-samples 64 sampling.cfg_scale=4
    fastdit sample runs/mine --classes otter,zebra --seeds 0-7 --cfg_scale 1,1.5,4
    The files do not depend on the number of processes. To continue an interrupted run, repeat the command.
    """
    parser.add_argument("--checkpoint", help="the same as RUN")
    parser.add_argument("--out", help="output folder (RUN/samples), or file of a picture")
    parser.add_argument("--num-samples", "--samples", type=int, help="(64)")
    parser.add_argument("--labels", help="balanced (default), random, or classes by name or number: 207,360")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema")
    parser.add_argument("--seed", type=int, help="(0)")
    parser.add_argument("--device", help=DEVICE)
    take_pictures(parser)
    take_words(parser, "RUN")

    def run(arguments: Namespace) -> None:
        path = one_name(arguments, "checkpoint", "run")
        if arguments.seeds and arguments.seed is not None:
            raise ValueError(f"--seed={arguments.seed} and --seeds={arguments.seeds} are the same; give one")
        arguments.seed = arguments.seed or 0
        if wants_picture(arguments):
            return make_picture(path, arguments)
        from fastdit.sampling import sample

        if Path(arguments.out or "").suffix in (".png", ".gif"):
            raise ValueError(f"--out={arguments.out} is for a picture; give --classes or --seeds, or name a folder")
        count = 64 if arguments.num_samples is None else arguments.num_samples
        out = sample(path, arguments.out or default_out(path, "samples"), count,
                     overrides=arguments.overrides, seed=arguments.seed, labels=arguments.labels,
                     weights=arguments.weights, device=arguments.device)  # fmt: skip
        if os.environ.get("RANK", "0") == "0":
            print(f"{counted(count, 'image')} in {out}; see {out / 'grid.png'}")

    return run


def quickstart(parser: ArgumentParser) -> Command:
    """Train a DiT on images of digits and sample from it, in minutes."""
    parser.add_argument("--out", default="quickstart", help="a new or empty output folder")
    parser.add_argument("--seed", type=int, default=0)
    take_words(parser, None)

    def run(arguments: Namespace) -> None:
        from fastdit.quickstart import quickstart

        check_alone(f"--seed={arguments.seed}", "seed", arguments.overrides)
        quickstart(arguments.out, seed=arguments.seed, overrides=arguments.overrides)

    return run


def launch(parser: ArgumentParser) -> Command:
    """Run a command on several GPUs or nodes: fastdit launch --gpus 8 train ..."""
    parser.add_argument("--gpus", type=int, required=True, help="processes on this node")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--master", help="HOST:PORT of the first node, the same on all; needed with --nodes")
    parser.add_argument("command_line", nargs=argparse.REMAINDER, metavar="COMMAND ...")

    def run(arguments: Namespace) -> None:
        if not arguments.command_line or arguments.command_line[0] not in LAUNCHED:
            parser.error(f"name {', '.join(LAUNCHED[:-1])} or {LAUNCHED[-1]} after the options")
        if arguments.nodes > 1 and not arguments.master:
            parser.error("several nodes need --master HOST:PORT, the same on all of them")
        places = ["--standalone"]
        if arguments.nodes > 1:
            places = ["--nnodes", str(arguments.nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", arguments.master]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(arguments.gpus), *places]
        os.execv(sys.executable, [*torchrun, "-m", "fastdit.cli", *arguments.command_line])

    return run
