"""The subcommands of `fastdit`: each function adds its arguments to a parser and returns what runs it."""

import argparse
import json
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

from fastdit.config import load_config
from fastdit.errors import EXIT_CODE

DEVICE = "cpu, cuda:0, ... (default: this process's GPU if there is one)"
RUN = "a run folder, or one of its checkpoints/step-*"
Command = Callable[[Namespace], None]


def _words(parser: ArgumentParser, name: str | None, overrides: bool = True) -> None:
    """Let the command take up to one name, and overrides."""
    metavar = f"[{name}] section.key=value" if name and overrides else name or "section.key=value"
    parser.add_argument("words", nargs="*", metavar=metavar, help=argparse.SUPPRESS if not name else None)
    parser.set_defaults(max_names=1 if name else 0, **({"takes_overrides": True} if overrides else {}))


def _name(arguments: Namespace, option: str, what: str) -> str:
    """The command's one name, given as a word or as `option`."""
    given = [*arguments.names, *filter(None, [getattr(arguments, option)])]
    if len(given) != 1:
        arguments.parser.error(f"name one {what}" + (f", not {' and '.join(given)}" if given else ""))
    return given[0]


def extract(parser: ArgumentParser) -> Command:
    """Encode images to latent shards.

    Any number of processes writes the same files: fastdit launch --gpus 8 extract --images DIR --out DIR --vae VAE
    After an interruption, the same command keeps the shards that were finished.
    """
    parser.add_argument(
        "--images",
        required=True,
        help="a folder with a subfolder per class, a folder of images, a CSV or JSONL file with path and label, a "
        "WebDataset, ImageNet's or CIFAR's archive, or Parquet files of the Hugging Face hub",
    )
    parser.add_argument("--out", required=True, help="output folder; it appears once it is complete")
    parser.add_argument("--vae", required=True, help="AutoencoderKL or AutoencoderDC: a local folder or a hub name")
    parser.add_argument("--image-size", default="256", help="center crop in pixels: a side, or WIDTHxHEIGHT (256)")
    parser.add_argument("--batch-size", type=int, default=32, help="images per batch and process (32)")
    parser.add_argument("--dtype", default="float16", help="storage dtype: float16 (default) or float32")
    parser.add_argument("--precision",
                        help="of the VAE: float32, bfloat16 (default on a GPU from Ampere on) or float16")  # fmt: skip
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None,
                        help="compile the encoder (default: on a GPU, for 10,000 images or more)")  # fmt: skip
    parser.add_argument("--adm-exact", action="store_true",
                        help="read images as ADM and DiT: EXIF, transparency and 16 bits not handled")  # fmt: skip
    parser.add_argument("--workers", type=int, help="decoding threads per process (default: its share of the cores)")
    parser.add_argument("--shard-size", type=int, default=2048, help="images per shard (2048)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it holds latents")
    parser.add_argument("--device", help=DEVICE)
    options = [action.dest for action in parser._actions if action.dest not in ("help", "device")]

    def run(arguments: Namespace) -> None:
        from fastdit.data.extract import extract_features
        from fastdit.distributed import close, init

        ranks = init(arguments.device)
        try:
            extract_features(**{key: getattr(arguments, key) for key in options}, ranks=ranks)
        finally:
            close()

    return run


def train(parser: ArgumentParser) -> Command:
    """Train a network on latents.

    fastdit train sit_s_2 data.shards=latents run_dir=runs/mine
    CONFIG is a YAML file, or the name of an included config (fastdit configs). Repeat the command with --resume to
    continue; if the run folder does not exist, training starts from the beginning.
    """
    parser.add_argument("--config", help="the same as CONFIG")
    parser.add_argument("--resume", action="store_true", help="continue from the latest checkpoint in run_dir")
    parser.add_argument("--images", help="extract the latents of these images first, if data.shards does not exist yet")
    parser.add_argument("--device", help=DEVICE)
    parser.add_argument("--help-config", action="store_true", help="list every config key and exit")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    _words(parser, "CONFIG")

    def run(arguments: Namespace) -> None:
        if arguments.help_config:
            from fastdit.listings import keys

            return print(keys())
        config = load_config(_name(arguments, "config", "config, such as sit_s_2"), arguments.overrides)

        from fastdit.convert import read_initial
        from fastdit.report import report_at_end
        from fastdit.training.loop import train  # after load_config: importing torch takes seconds

        if arguments.images:
            from fastdit.api import with_latents

            config = with_latents(config, arguments.images, arguments.device)
        train(config, resume=arguments.resume, device=arguments.device, read_initial=read_initial, report=report_at_end)

    return run


def sample(parser: ArgumentParser) -> Command:
    """Sample images from a run to PNG files, an .npz file for evaluation and a grid.

    fastdit sample runs/mine --out samples --num-samples 64 sampling.cfg_scale=4
    The files do not depend on the number of processes. To continue an interrupted run, repeat the command.
    """
    parser.add_argument("--checkpoint", help="the same as RUN")
    parser.add_argument("--out", help="output folder (RUN/samples)")
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--labels", default="balanced", help="balanced, random, or classes by name or number: 207,360")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help=DEVICE)
    _words(parser, "RUN")

    def run(arguments: Namespace) -> None:
        path = _name(arguments, "checkpoint", "run")
        from fastdit.sampling import sample

        out = sample(path, arguments.out or Path(path) / "samples", arguments.num_samples,
                     overrides=arguments.overrides, seed=arguments.seed, labels=arguments.labels,
                     weights=arguments.weights, device=arguments.device)  # fmt: skip
        if os.environ.get("RANK", "0") == "0":
            print(f"{arguments.num_samples} images in {out}; see {out / 'grid.png'}")

    return run


def evaluate(parser: ArgumentParser) -> Command:
    """Measure samples against real images, or compare two measurements.

    fastdit evaluate samples --reference images --out results.jsonl
    fastdit evaluate --compare a.jsonl b.jsonl
    SAMPLES: a folder that fastdit sample wrote, a folder of images, or an .npz file with arr_0, uint8 (N, H, W, 3).
    --reference also takes archives as fastdit extract does, files of --save-reference, and ADM's with mu and sigma.
    The digits do not depend on the number of processes. --compare reads the last line of each file.
    """
    parser.add_argument("--reference", help="real images, or their statistics")
    parser.add_argument("--features", default="efficientnet-lite0", metavar="NAME[=PATH]",
                        help="efficientnet-lite0 (default), inception-v3=FILE, dinov2-vit-l14=FOLDER")  # fmt: skip
    parser.add_argument("--metrics", help="frechet, frechet_infinity, kid, precision_recall, density_coverage, "
                                          "inception_score, with commas between (default: all that apply)")  # fmt: skip
    parser.add_argument("--image-size", help="center-crop folders of images, as fastdit extract does")
    parser.add_argument("--seed", type=int, default=0, help="of the random subsets")
    parser.add_argument("--save-reference", metavar="FILE", help="an .npz file that --reference reads in no time")
    parser.add_argument("--out", help="append the result and its protocol to this file, as one JSON line")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two files of --out")
    parser.add_argument("--device", help=DEVICE)
    parser.add_argument("--samples", help=argparse.SUPPRESS)
    _words(parser, "SAMPLES", overrides=False)

    def run(arguments: Namespace) -> None:
        from fastdit.distributed import close, init
        from fastdit.evaluation.evaluate import compare, evaluate, summary
        from fastdit.files import append_to

        if arguments.compare:
            return print(compare(*arguments.compare))
        samples = _name(arguments, "samples", "folder or .npz file of samples")
        if not arguments.reference:
            arguments.parser.error("give real images with --reference")
        if arguments.out and not Path(arguments.out).parent.is_dir():
            raise ValueError(f"--out={arguments.out}: there is no folder {Path(arguments.out).parent}; create it")
        metrics = arguments.metrics.split(",") if arguments.metrics else None
        ranks = init(arguments.device)
        try:
            chosen = {key: getattr(arguments, key) for key in ("features", "image_size", "seed", "save_reference")}
            result = evaluate(samples, arguments.reference, ranks, metrics=metrics, **chosen)
        finally:
            close()
        if ranks.is_main:
            print(summary(result))
            if arguments.out:
                with append_to(Path(arguments.out)) as file:
                    file.write(json.dumps(result) + "\n")

    return run


def report(parser: ArgumentParser) -> Command:
    """Show a run on one HTML page, or several side by side.

    fastdit report runs/mine
    fastdit report runs/a runs/b --out comparison.html sampling.cfg_scale=4
    Training writes the page of its run at its end.
    """
    parser.add_argument("--out", help="the page (RUN/report.html; for several runs: report.html)")
    parser.add_argument("--device", help=DEVICE)
    _words(parser, "RUN ...")
    parser.set_defaults(max_names=4)

    def run(arguments: Namespace) -> None:
        if not arguments.names:
            arguments.parser.error("name one run, or up to four")
        from fastdit.distributed import init
        from fastdit.report import write_report

        device = init(arguments.device).device
        print(write_report(arguments.names, arguments.out, device=device, overrides=arguments.overrides))

    return run


def plan(parser: ArgumentParser) -> Command:
    """Predict the parameters, memory, speed and training time of a config."""
    parser.add_argument("--config", help="the same as CONFIG")
    parser.add_argument("--gpu", default="H200", help="A100-80G, H100, H200, B200, ...")
    parser.add_argument("--gpus", type=int, default=1)
    _words(parser, "CONFIG")

    def run(arguments: Namespace) -> None:
        config = load_config(_name(arguments, "config", "config, such as dit_xl_2"), arguments.overrides)
        from fastdit.plan import report

        print(report(config, arguments.gpu, arguments.gpus))

    return run


def convert(parser: ArgumentParser) -> Command:
    """Convert between fastdit, official .pt files and diffusers folders."""
    parser.add_argument("src", help="a .pt file of DiT, SiT or fast-DiT, a DiTPipeline folder, a run or checkpoint")
    parser.add_argument("--to", required=True, help="fastdit, official or diffusers")
    parser.add_argument("--out", required=True, help="the output: a new folder or a new .pt file")
    parser.add_argument("--config", help="a YAML file with settings that the source lacks: objective, autoencoder")
    parser.add_argument("--heads", type=int, help="number of attention heads, if the source does not state it")
    parser.add_argument("--from-official", action="store_true", help="a DDPM pipeline has converted official weights")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="weights to convert to diffusers")
    _words(parser, None)

    def run(arguments: Namespace) -> None:
        from fastdit.convert import convert

        options = {key: getattr(arguments, key) for key in ("config", "heads", "weights", "from_official")}
        convert(arguments.src, arguments.to, arguments.out, overrides=arguments.overrides, **options)

    return run


def verify(parser: ArgumentParser) -> Command:
    """Check a checkpoint or a folder of latents for damage."""
    parser.add_argument("path", help=f"{RUN}, or a folder of latents")

    def run(arguments: Namespace) -> None:
        from fastdit.verify import verify

        findings = verify(arguments.path)
        for line in findings:
            print("wrong:", line)
        if findings:
            raise SystemExit(EXIT_CODE)
        print("all is well")

    return run


def ema(parser: ArgumentParser) -> Command:
    """Rebuild the EMA of any width after training."""
    parser.add_argument("run_dir", metavar="RUN", help="the folder of a run with training.ema_stds")
    parser.add_argument("--std", required=True, help="relative widths, such as 0.05,0.1")
    parser.add_argument("--out", required=True, help="a new folder for one checkpoint per width")
    parser.add_argument("--step", type=int, help="the step to rebuild it at (default: the newest)")

    def run(arguments: Namespace) -> None:
        from fastdit.training.posthoc import rebuild

        try:
            stds = [float(part) for part in arguments.std.split(",")]
        except ValueError:
            message = f"--std={arguments.std} is not a list of numbers; use for example --std 0.05,0.1"
            raise ValueError(message) from None
        rebuild(arguments.run_dir, stds, arguments.out, step=arguments.step)

    return run


def likelihood(parser: ArgumentParser) -> Command:
    """Compute the likelihood of latents under a checkpoint."""
    parser.add_argument("--checkpoint", required=True, help=RUN)
    parser.add_argument("--shards", required=True, help="a folder of latents")
    parser.add_argument("--num-images", type=int, default=64)
    parser.add_argument("--probes", type=int, default=4, help="random directions for the divergence")
    parser.add_argument("--steps", type=int, default=50, help="number of ODE steps")
    parser.add_argument("--method", choices=("heun", "euler", "vlb"), default="heun", help="vlb: bound, DDPM only")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--weights", choices=("ema", "model"), default="ema")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help=DEVICE)
    options = [a.dest for a in parser._actions if a.dest not in ("help", "checkpoint", "shards")]
    parser.add_argument("--out", help="a JSON file for the results")
    _words(parser, None)

    def run(arguments: Namespace) -> None:
        from fastdit.likelihood import likelihood, write_report

        chosen = {key: getattr(arguments, key) for key in options}
        report = likelihood(arguments.checkpoint, arguments.shards, overrides=arguments.overrides, **chosen)
        if arguments.out:
            write_report(report, arguments.out)

    return run


def quickstart(parser: ArgumentParser) -> Command:
    """Train a DiT on images of digits and sample from it, in minutes."""
    parser.add_argument("--out", default="quickstart", help="a new or empty output folder")
    parser.add_argument("--seed", type=int, default=0)
    _words(parser, None)

    def run(arguments: Namespace) -> None:
        from fastdit.quickstart import quickstart

        quickstart(arguments.out, seed=arguments.seed, overrides=arguments.overrides)

    return run


def configs(parser: ArgumentParser) -> Command:
    """List the included configs with their cost and published result."""

    def run(arguments: Namespace) -> None:
        from fastdit.listings import configs

        print(configs())

    return run


def doctor(parser: ArgumentParser) -> Command:
    """Report what this machine can do: versions, GPUs, kernels, attention, launchers."""

    def run(arguments: Namespace) -> None:
        from fastdit.doctor import report

        print(report())

    return run


def launch(parser: ArgumentParser) -> Command:
    """Run a command on several GPUs or nodes: fastdit launch --gpus 8 train ..."""
    parser.add_argument("--gpus", type=int, required=True, help="processes on this node")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--master", help="HOST:PORT of the first node, the same on all; needed with --nodes")
    parser.add_argument("command_line", nargs=argparse.REMAINDER, metavar="COMMAND ...")

    def run(arguments: Namespace) -> None:
        if not arguments.command_line or arguments.command_line[0] not in ("extract", "train", "sample", "evaluate"):
            parser.error("name extract, train, sample or evaluate after the options")
        if arguments.nodes > 1 and not arguments.master:
            parser.error("several nodes need --master HOST:PORT, the same on all of them")
        places = ["--standalone"]
        if arguments.nodes > 1:
            places = ["--nnodes", str(arguments.nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", arguments.master]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(arguments.gpus), *places]
        os.execv(sys.executable, [*torchrun, "-m", "fastdit.cli", *arguments.command_line])

    return run


COMMANDS = {
    command.__name__: command
    for command in (extract, train, sample, evaluate, report, plan, convert, verify, ema, likelihood, configs, doctor,
                    quickstart, launch)  # fmt: skip
}
