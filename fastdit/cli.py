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

    arguments = parser.parse_args()
    arguments.run(arguments)


def _quickstart(arguments: argparse.Namespace) -> None:
    from fastdit.quickstart import quickstart

    quickstart(arguments.out, seed=arguments.seed, overrides=arguments.overrides)


if __name__ == "__main__":
    main()
