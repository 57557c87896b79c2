"""The `fastdit` command."""

import argparse

from fastdit.errors import friendly_exit


@friendly_exit()
def main() -> None:
    parser = argparse.ArgumentParser(prog="fastdit", description="Train diffusion transformers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("quickstart", help="digits to latents to a trained DiT to samples, in minutes")
    command.add_argument("--out", default="quickstart", help="folder to write, new or empty")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="of configs/quickstart.yaml")
    command.set_defaults(run=_quickstart)

    command = commands.add_parser("plan", help="parameters, memory, speed and hours of a config on a GPU, predicted")
    command.add_argument("--config", required=True, help="a YAML file of configs/")
    command.add_argument("--gpu", default="H200", help="A100-80G, H100, H200, B200")
    command.add_argument("--gpus", type=int, default=1)
    command.add_argument("overrides", nargs="*", metavar="section.key=value")
    command.set_defaults(run=_plan)

    arguments = parser.parse_args()
    arguments.run(arguments)


def _quickstart(arguments: argparse.Namespace) -> None:
    from fastdit.quickstart import quickstart

    quickstart(arguments.out, seed=arguments.seed, overrides=arguments.overrides)


def _plan(arguments: argparse.Namespace) -> None:
    from fastdit.config import load_config
    from fastdit.plan import report

    print(report(load_config(arguments.config, arguments.overrides), arguments.gpu, arguments.gpus))


if __name__ == "__main__":
    main()
