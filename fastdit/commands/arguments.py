"""What the commands share: arguments that take names and overrides."""

import argparse
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

DEVICE = "cpu, cuda:0, ... (default: this process's GPU if there is one)"
RUN = "a run folder, or one of its checkpoints/step-*"
Command = Callable[[Namespace], None]


def take_words(parser: ArgumentParser, name: str | None, overrides: bool = True) -> None:
    """Let the command take up to one name, and overrides."""
    metavar = f"[{name}] section.key=value" if name and overrides else name or "section.key=value"
    parser.add_argument("words", nargs="*", metavar=metavar, help=argparse.SUPPRESS if not name else None)
    parser.set_defaults(max_names=1 if name else 0, **({"takes_overrides": True} if overrides else {}))


def values(arguments: Namespace, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names}


@contextmanager
def processes(arguments: Namespace) -> Iterator[Any]:
    """The `Ranks` of a command that several processes may share; their group ends with the block."""
    from fastdit.distributed import close, init

    ranks = init(arguments.device)
    try:
        yield ranks
    finally:
        close()


def one_name(arguments: Namespace, option: str, what: str) -> str:
    """The command's one name, given as a word or as `option`."""
    given = [*arguments.names, *filter(None, [getattr(arguments, option)])]
    if len(given) != 1:
        arguments.parser.error(f"name one {what}" + (f", not {' and '.join(given)}" if given else ""))
    return given[0]
