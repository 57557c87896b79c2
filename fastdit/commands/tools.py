"""Around a run: plan, convert, ema, configs and doctor.

Each function adds its arguments to a parser and returns what runs it.
"""

from argparse import ArgumentParser, Namespace

from fastdit.commands.arguments import Command, one_name, take_words, values
from fastdit.config import load_config


def plan(parser: ArgumentParser) -> Command:
    """Predict the parameters, memory, speed and training time of a config.

    Image size, classes and the size of the latents are those of data.shards, where they are on this machine.
    data.shards=synthetic:IMAGES/CxHxW/CLASSES stands for any.
    """
    parser.add_argument("--config", help="the same as CONFIG")
    parser.add_argument("--gpu", default="H200", help="A100-80G, H100, H200, B200, ...")
    parser.add_argument("--gpus", type=int, default=1)
    take_words(parser, "CONFIG")

    def run(arguments: Namespace) -> None:
        config = load_config(one_name(arguments, "config", "config, such as dit_xl_2"), arguments.overrides)
        from fastdit.plan import report

        print(report(config, arguments.gpu, arguments.gpus))

    return run


def convert(parser: ArgumentParser) -> Command:
    """Convert between fastdit, official .pt files and diffusers folders.

    fastdit convert DiT-XL-2-256x256.pt --to fastdit --out runs/dit objective=ddpm
    fastdit convert vavae.pt --to diffusers --out vavae
    An autoencoder in the format of latent-diffusion, as VA-VAE's, becomes a folder for --vae.
    """
    parser.add_argument("src", help="a .pt file of DiT, SiT or fast-DiT, a DiTPipeline folder, a run or checkpoint, or "
                                    "a .ckpt, .pt or .safetensors file of an autoencoder")  # fmt: skip
    parser.add_argument("--to", required=True, help="fastdit, official or diffusers")
    parser.add_argument("--out", required=True, help="the output: a new folder or a new .pt file")
    parser.add_argument("--config", help="a YAML file with settings that the source lacks: objective, autoencoder")
    parser.add_argument("--heads", type=int, help="number of attention heads, if the source does not state it")
    parser.add_argument("--from-official", action="store_true", help="a DDPM pipeline has converted official weights")
    parser.add_argument("--weights", choices=("ema", "model"),
                        help="which of them to convert to diffusers (ema; of an autoencoder: model)")  # fmt: skip
    parser.add_argument("--scale", type=float, help="scaling_factor of an autoencoder (that in the file, else 1; "
                        "Stable Diffusion: 0.18215)")  # fmt: skip
    parser.add_argument("--shift", type=float, help="shift_factor of an autoencoder (0; FLUX.1: 0.1159, and --scale "
                        "0.3611)")  # fmt: skip
    take_words(parser, None)

    def run(arguments: Namespace) -> None:
        from fastdit.convert import convert

        options = ("config", "heads", "weights", "from_official", "scale", "shift", "overrides")
        convert(arguments.src, arguments.to, arguments.out, **values(arguments, options))

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
