"""User errors: a command prints one line, `error: key=value is wrong because ...; remedy`, and exits with code 2."""

import errno
import os
import re
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXIT_CODE = 2
CLOSED_PIPE = 128 + 13  # as of a command that SIGPIPE ends
LOST = ("connection", "gloo", "nccl", "timed out")  # in the errors of a collective whose partner is gone
# before a process that is not the main one prints its error, and before one that failed because another one did
FIRST_S, LAST_S = 2.0, 10.0


class OtherFailed(ValueError):
    """Another process has failed and says why. The launcher ends this one, usually before it speaks as well."""


def is_lost(error: BaseException | None) -> bool:
    """Whether the error is that of a collective whose partner is gone."""
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in LOST)


def is_no_space(error: OSError) -> bool:
    """Whether the disk is full or the user's quota is exceeded."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def friendly_exit() -> Iterator[None]:
    """Turns a ValueError (a user error), a full disk, a file that cannot be used, too little memory or the end of
    another process into a one-line message.

    The exit code is 2; 141, without a line, where the output is a closed pipe, as in `fastdit ... | head -1`. Use it as
    a context manager or as a decorator (`@friendly_exit()`) of a command's main function.
    With FASTDIT_DEBUG=1 in the environment, the exception is raised with its traceback.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # errors now, not when the interpreter exits
    except BrokenPipeError:
        if not _discarded():
            raise
        raise SystemExit(CLOSED_PIPE) from None
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        message: object = error
        if isinstance(error, RuntimeError):
            if os.environ.get("WORLD_SIZE", "1") == "1" or not is_lost(error):
                raise
            reason = re.sub(r"^\[\S*\] ", "", str(error)).partition(". ")[0]  # without the line of gloo's source
            message = (f"communication between the processes failed ({reason}); if another one has ended, see its "
                       "message or that of the launcher")  # fmt: skip
        where = getattr(error, "filename2", None) or getattr(error, "filename", None) or "the output"
        if isinstance(error, MemoryError):
            message = f"this machine has too little memory ({error or 'none is left'})"
        if isinstance(error, OSError) and is_no_space(error):
            message = f"no space left for {where}; free some or write elsewhere"
        elif isinstance(error, OSError) and error.errno == errno.EFBIG:
            message = f"{where} would exceed the limit on file sizes; raise it (ulimit -f)"
        elif isinstance(error, OSError) and error.filename:
            message = f"{error.filename} cannot be used ({error.strerror}); check the path and its permissions"
        elif isinstance(error, OSError):
            raise
        if os.environ.get("FASTDIT_DEBUG") == "1":
            raise
        if isinstance(error, OtherFailed | RuntimeError):
            time.sleep(LAST_S)
        elif os.environ.get("RANK", "0") != "0":
            time.sleep(FIRST_S)  # if the main process fails as well, it speaks first and the launcher ends this one
        print("error:", " ".join(str(message).split()), file=sys.stderr, flush=True)
        raise SystemExit(EXIT_CODE) from error


def _discarded() -> bool:
    """Whether the standard output is a pipe that nobody reads; then what is left of it is discarded."""
    poll = select.poll()
    poll.register(1, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return True


@contextmanager
def out_of_memory_says(remedy: str) -> Iterator[None]:
    """Turns an out-of-memory error of a device into a ValueError that ends with the remedy."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ValueError(f"{reason}; {remedy}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether the error is PyTorch's OutOfMemoryError, or that of a library or driver when an allocation fails."""
    import torch

    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "CUDA error: out of memory" in text or "ALLOC_FAILED" in text


def make_folder(path: Path, key: str) -> None:
    """Creates an output folder; raises a one-line ValueError if that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_no_space(error):
            raise
        raise ValueError(f"{key}={path} cannot be created ({error.strerror}); choose another folder") from None


def counted(number: float, noun: str, plural: str = "", spec: str = ",") -> str:
    """A number and its noun: 1 shard, 1,234 shards; `plural` where it is not the noun with an s."""
    text = f"{number:{spec}}"
    return f"{text} {noun if text == '1' else plural or f'{noun}s'}"


def output_file(path: str | Path, key: str, suffix: str, new: bool = False) -> Path:
    """A file to write, whose folder is created; raises a one-line ValueError unless it ends in `suffix`.

    `new`: also where the file exists.
    """
    path = Path(path)
    if path.suffix.lower() != suffix or path.is_dir():
        raise ValueError(f"{key}={path} must be a file that ends in {suffix}")
    if new and path.exists():
        raise ValueError(f"{key}={path} exists; choose another name")
    make_folder(path.parent, key)
    return path
