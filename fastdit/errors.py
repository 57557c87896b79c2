"""A user's mistake ends a command in one line: `error: key=value is wrong because ...; remedy`, exit code 2."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXIT_CODE = 2


def is_no_space(error: OSError) -> bool:
    """True when the disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def friendly_exit() -> Iterator[None]:
    """Turns a ValueError (a user's mistake) or a full disk into one line on stderr and exit code 2.

    Works as a context manager and as a decorator (`@friendly_exit()`), around a command's main function.
    FASTDIT_DEBUG=1 in the environment lets the exception through, with its traceback.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        full = isinstance(error, OSError) and is_no_space(error)
        if os.environ.get("FASTDIT_DEBUG") == "1" or not (full or isinstance(error, ValueError)):
            raise
        message = f"no space left for {error.filename or 'the output'}; free some or write elsewhere" if full else error
        print("error:", " ".join(str(message).split()), file=sys.stderr, flush=True)
        raise SystemExit(EXIT_CODE) from error


@contextmanager
def out_of_memory_says(remedy: str) -> Iterator[None]:
    """Turns a device's lack of memory into a ValueError that ends with the remedy."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        said = str(error).splitlines()[0].partition(". ")[0]
        raise ValueError(f"{said}; {remedy}") from error


def is_out_of_memory(error: Exception) -> bool:
    """The allocator's own error, or what a library or the driver says when it asked in vain."""
    import torch

    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "CUDA error: out of memory" in said or "ALLOC_FAILED" in said


def make_folder(path: Path, key: str) -> None:
    """Creates a folder for output; ValueError in one line where that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_no_space(error):
            raise
        raise ValueError(f"{key}={path} cannot be made ({error.strerror}); choose another folder") from None
