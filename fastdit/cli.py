"""The `fastdit` command."""

import argparse

from fastdit.errors import EXIT_CODE, friendly_exit


@friendly_exit()
def main() -> None:
    parser = argparse.ArgumentParser(prog="fastdit", description="Train diffusion transformers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("quickstart", help="train a DiT on images of digits and sample from it, in minutes")
    command.add_argument("--out", default="quickstart", help="a new or empty output folder")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="for configs/quickstart.yaml")
    command.set_defaults(run=_quickstart)

    command = commands.add_parser("plan", help="predict the parameters, memory, speed and training time of a config")
    command.add_argument("--config", required=True, help="a YAML file, such as those in configs/")
    command.add_argument("--gpu", default="H200", help="A100-80G, H100, H200, B200")
    command.add_argument("--gpus", type=int, default=1)
    command.add_argument("overrides", nargs="*", metavar="section.key=value")
    command.set_defaults(run=_plan)

    command = commands.add_parser("convert", help="convert between fastdit, official .pt files and diffusers folders")
    command.add_argument("src", help="a .pt file of DiT, SiT or fast-DiT, a DiTPipeline folder, a run or checkpoint")
    command.add_argument("--to", required=True, help="fastdit, official or diffusers")
    command.add_argument("--out", required=True, help="the output: a new folder or a new .pt file")
    command.add_argument("--config", help="a YAML file with settings that the source lacks: objective, autoencoder")
    command.add_argument("--heads", type=int, help="number of attention heads, if it cannot be inferred")
    command.add_argument("--weights", choices=("ema", "model"), default="ema", help="weights to convert to diffusers")
    command.add_argument(
        "--from-official", action="store_true", help="the weights of the diffusers folder come from the official DiT"
    )
    command.add_argument("overrides", nargs="*", metavar="section.key=value")
    command.set_defaults(run=_convert)

    command = commands.add_parser("verify", help="check a checkpoint or a folder of latents for damage")
    command.add_argument("path", help="a run folder, one of its checkpoints/step-*, or a folder of latents")
    command.set_defaults(run=_verify)

    command = commands.add_parser("ema", help="rebuild the EMA of any width from the averages of a run")
    command.add_argument("run_dir", metavar="RUN", help="the folder of a run with training.ema_stds")
    command.add_argument("--std", required=True, help="relative widths, such as 0.05,0.1")
    command.add_argument("--out", required=True, help="a new folder; each width becomes a checkpoint OUT/std-0.050")
    command.add_argument("--step", type=int, help="an earlier step with stored averages (default: the newest)")
    command.set_defaults(run=_ema)

    command = commands.add_parser("likelihood", help="compute the likelihood of latents under a checkpoint")
    command.add_argument("--checkpoint", required=True, help="a run folder, or one of its checkpoints/step-*")
    command.add_argument("--shards", required=True, help="a folder that extract_features.py wrote")
    command.add_argument("--num-images", type=int, default=64)
    command.add_argument("--probes", type=int, default=4, help="random directions for the divergence")
    command.add_argument("--steps", type=int, default=50, help="number of ODE steps")
    command.add_argument("--method", choices=("heun", "euler", "vlb"), default="heun", help="vlb: bound, DDPM only")
    command.add_argument("--batch-size", type=int, default=16)
    command.add_argument("--weights", choices=("ema", "model"), default="ema")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", help="cpu, cuda:0, ... (default: the GPU if there is one)")
    command.add_argument("--out", help="a JSON file for the results")
    command.add_argument("overrides", nargs="*", metavar="section.key=value")
    command.set_defaults(run=_likelihood)

    arguments, rest = parser.parse_known_args()  # in subcommands, argparse leaves positionals after options
    unknown = [argument for argument in rest if argument.startswith("-") or "=" not in argument]
    if unknown or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    if rest:
        arguments.overrides += rest
    arguments.run(arguments)


def _quickstart(arguments: argparse.Namespace) -> None:
    from fastdit.quickstart import quickstart

    quickstart(arguments.out, seed=arguments.seed, overrides=arguments.overrides)


def _plan(arguments: argparse.Namespace) -> None:
    from fastdit.config import load_config
    from fastdit.plan import report

    print(report(load_config(arguments.config, arguments.overrides), arguments.gpu, arguments.gpus))


def _convert(arguments: argparse.Namespace) -> None:
    from fastdit.convert import convert

    convert(
        arguments.src,
        arguments.to,
        arguments.out,
        config=arguments.config,
        overrides=arguments.overrides,
        heads=arguments.heads,
        from_official=arguments.from_official,
        weights=arguments.weights,
    )


def _verify(arguments: argparse.Namespace) -> None:
    from fastdit.verify import verify

    findings = verify(arguments.path)
    for line in findings:
        print("wrong:", line)
    if findings:
        raise SystemExit(EXIT_CODE)
    print("all is well")


def _ema(arguments: argparse.Namespace) -> None:
    from fastdit.training.posthoc import rebuild

    try:
        stds = [float(part) for part in arguments.std.split(",")]
    except ValueError:
        raise ValueError(f"--std={arguments.std} is not a list of numbers; use for example --std 0.05,0.1") from None
    rebuild(arguments.run_dir, stds, arguments.out, step=arguments.step)


def _likelihood(arguments: argparse.Namespace) -> None:
    from fastdit.likelihood import likelihood, write_report

    report = likelihood(
        arguments.checkpoint,
        arguments.shards,
        num_images=arguments.num_images,
        probes=arguments.probes,
        steps=arguments.steps,
        method=arguments.method,
        batch_size=arguments.batch_size,
        weights=arguments.weights,
        seed=arguments.seed,
        device=arguments.device,
        overrides=arguments.overrides,
    )
    if arguments.out:
        write_report(report, arguments.out)


if __name__ == "__main__":
    main()
