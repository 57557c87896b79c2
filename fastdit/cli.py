"""The `fastdit` command: one parser for the subcommands in commands/, and answers to typing mistakes.

Arguments without `=` are names (of a config, a run, ...), those with `=` override config values.
"""

import argparse
import difflib
import inspect
import os
import sys
from argparse import Namespace
from collections.abc import Sequence

from fastdit import __version__
from fastdit.commands import COMMANDS
from fastdit.commands.make import LAUNCHED
from fastdit.config import suggest
from fastdit.errors import friendly_exit
from fastdit.launcher import die_with_parent
from fastdit.schema import Config

READERS = ("configs", "doctor", "launch", "plan", "verify")  # write nothing, so they may run in any environment


class Parser(argparse.ArgumentParser):
    """Reports every mistake as a ValueError, which `friendly_exit` prints in one line."""

    def error(self, message: str):
        raise ValueError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv` (default: that of the process)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in LAUNCHED:  # another command may be meant to outlive the shell that started it
        die_with_parent()
    with friendly_exit():
        parser = Parser(prog="fastdit", description="Train diffusion transformers (DiT, SiT).")
        parser.add_argument("--version", action="version", version=f"fastdit {__version__}")
        subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
        for name, add in COMMANDS.items():
            help = inspect.getdoc(add)
            subparser = subparsers.add_parser(name, help=help.splitlines()[0].rstrip("."), description=help,
                                              formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
            subparser.set_defaults(run=add(subparser), parser=subparser, words=[])
        if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
            near = difflib.get_close_matches(argv[0], COMMANDS, 1, 0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"fastdit {argv[0]} is not a command; {hint}Commands: {', '.join(COMMANDS)}")
        # argparse leaves positionals after options in `rest`
        arguments, rest = parser.parse_known_args([_hyphens(word) for word in argv])
        if unknown := next((word for word in rest if word.startswith("-")), None):
            raise ValueError(_unknown_option(arguments, rest, unknown))
        words = [*arguments.words, *rest]
        arguments.overrides = [word for word in words if "=" in word]
        arguments.names = [word for word in words if "=" not in word]
        allowed = getattr(arguments, "max_names", 0), hasattr(arguments, "takes_overrides")
        extra = arguments.names[allowed[0] :] + ([] if allowed[1] else arguments.overrides)
        if extra:
            arguments.parser.error(f"unexpected argument {extra[0]!r}")
        world = os.environ.get("WORLD_SIZE", "1")
        if world != "1" and arguments.command not in (*LAUNCHED, *READERS):
            raise ValueError(f"fastdit {arguments.command} runs in one process, but the environment has WORLD_SIZE="
                             f"{world}; start it without a launcher, or set WORLD_SIZE=1")  # fmt: skip
        arguments.run(arguments)


def _hyphens(word: str) -> str:
    """--image_size -> --image-size; the launcher's --local_rank stays."""
    option, sign, value = word.partition("=")
    return option.replace("_", "-") + sign + value if word.startswith("--") and option != "--local_rank" else word


def _unknown_option(arguments: Namespace, rest: list[str], word: str) -> str:
    option, _, value = word.partition("=")
    following = rest[rest.index(word) + 1 :]
    value = value or (following[0] if following and not following[0].startswith("-") else "")
    known = [string for action in arguments.parser._actions for string in action.option_strings]
    near = difflib.get_close_matches(option, known, 1, 0.75)
    schema = getattr(arguments, "schema", Config)
    key = suggest(option.strip("-"), schema) if hasattr(arguments, "takes_overrides") else ""
    if key and (not near or key.endswith("." + option.strip("-").replace("-", "_"))):
        near = [f"{key}={value or '...'}"]
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{option} is not an option of {arguments.parser.prog}; {hint}see {arguments.parser.prog} --help"


if __name__ == "__main__":
    main()
