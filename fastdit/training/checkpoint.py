"""Atomic checkpoints: a checkpoint is complete, or it does not exist. training/state.py says what is in one.

Everything is written into `step-0000500.partial`, flushed to disk and renamed; only the rename makes it count.
checkpoint.json lists the size and the SHA-256 of every file, and its own; whoever reads a file checks it first.
"""

import errno
import json
import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from fastdit.distributed import Ranks
from fastdit.errors import OtherFailed
from fastdit.files import read_json, sealed, sha256, sync

META = "checkpoint.json"
NAME = re.compile(r"step-(\d{7,})")  # anything else in the folder is the user's own and is left alone
PARTIAL = re.compile(NAME.pattern + r"(\.replaced)?\.partial")
FULL = 1 << 20  # bytes: with less free space than this, a failed write means a full disk


class Writer:
    """Writes checkpoints in a thread of the main process, so that a step waits only for the copy into host memory.

    A context manager: leaving it waits for the write in progress.
    """

    def __init__(self, run_dir: Path, ranks: Ranks, keep: int, keep_every: int):
        self.run_dir, self.ranks, self.kept = run_dir, ranks, (keep, keep_every)
        self.pool, self.pending = ThreadPoolExecutor(1), None

    def start(self, step: int, write: Callable[[Path], None], meta: dict[str, Any]) -> Path:
        """Begin to write the checkpoint of `step`, as `save` does, and return its path; call `wait` before."""
        if self.ranks.is_main:
            self.pending = self.pool.submit(save, self.run_dir, step, write, meta, *self.kept)
        return path_of(self.run_dir, step)

    @property
    def failed(self) -> bool:
        return self.pending is not None and self.pending.done() and self.pending.exception() is not None

    def wait(self) -> None:
        """Wait for the write in progress and raise its error, on every process; a collective call."""
        error = self.pending.exception() if self.pending else None
        self.pending = None
        if self.ranks.any(error is not None):
            raise error or OtherFailed("the main process could not write a checkpoint")

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        self.pool.shutdown()


def path_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:07d}"


def save(
    run_dir: Path, step: int, write: Callable[[Path], None], meta: dict[str, Any], keep: int, keep_every: int = 0
) -> None:
    """Commit a checkpoint whose files `write(folder)` writes, then delete the old ones.

    Those kept are the `keep` newest (0: all), and those whose step is a multiple of `keep_every` (0: none).
    """
    final = path_of(run_dir, step)
    partial = final.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        commit(partial, final, {"step": step, **meta})
    except Exception as error:  # usually a full disk, which a library may report in its own words
        full = shutil.disk_usage(run_dir).free < FULL
        shutil.rmtree(partial, ignore_errors=True)
        if full:
            raise OSError(errno.ENOSPC, "No space left on device", str(final)) from None
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(final)
        raise
    for old in checkpoints(run_dir)[:-keep] if keep else []:
        if not keep_every or step_of(old) % keep_every:
            old.rename(old.with_suffix(".partial"))  # a kill from here on leaves nothing that looks like a checkpoint
    for path in final.parent.iterdir():
        if PARTIAL.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def complete(folder: Path, meta: dict[str, Any]) -> None:
    """Flush the files of a checkpoint to disk, and then its checkpoint.json."""
    for path in folder.rglob("*"):
        sync(path)
    write_meta(folder, meta)
    sync(folder / META)
    sync(folder)


def commit(partial: Path, final: Path, meta: dict[str, Any]) -> None:
    """Complete a checkpoint and rename it to its final name."""
    complete(partial, meta)
    replaced = final.with_suffix(".replaced.partial")
    if final.exists():  # the same step again: the old one is removed only when the new one is complete
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Write checkpoint.json: `meta`, the size and SHA-256 of every file in the folder, and its own digest."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != META)
    with ThreadPoolExecutor(4) as pool:
        digests = pool.map(lambda name: sha256(folder / name), names)
    sizes = ((folder / name).stat().st_size for name in names)
    files = {n: {"bytes": size, "sha256": digest} for n, size, digest in zip(names, sizes, digests, strict=True)}
    (folder / META).write_text(json.dumps(sealed({**meta, "files": files}), indent=1))


def checkpoints(run_dir: Path) -> list[Path]:
    """All complete checkpoints of a run, sorted by step."""
    found = [path for path in (Path(run_dir) / "checkpoints").glob("step-*") if NAME.fullmatch(path.name)]
    return sorted((path for path in found if (path / META).is_file()), key=step_of)


def step_of(folder: Path) -> int:
    return int(NAME.fullmatch(folder.name)[1])


def read_meta(folder: Path, contents: Iterable[str] | None = ()) -> dict[str, Any]:
    """checkpoint.json, after checking its own digest and that every listed file exists with its full size.

    `contents` names the files whose SHA-256 is checked as well (None: all). ValueError that names the bad file.
    """
    meta, faults = inspect(folder, contents)
    if faults:
        raise ValueError(f"checkpoint file {faults[0]}; use another step")
    return meta


def inspect(folder: Path, contents: Iterable[str] | None = None) -> tuple[dict[str, Any], list[str]]:
    """checkpoint.json ({} where it cannot be read) and every damaged or missing file, in words; see `read_meta`."""
    path = folder / META
    try:
        meta = read_json(path)
        check_types(meta)
        listed = {name: (int(entry["bytes"]), entry["sha256"]) for name, entry in meta["files"].items()}
    except OSError as error:
        return {}, [f"{path} cannot be read ({error.strerror})"]
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        reason = str(error).removeprefix(f"{path} is damaged: ")
        return {}, [f"{path} is damaged ({type(error).__name__}: {reason})"]
    if meta.pop("sha256") != sealed(meta)["sha256"]:
        return {}, [f"{path} is damaged: its SHA-256 is not the recorded one"]
    wanted = set(listed if contents is None else contents)

    def fault(name: str) -> str | None:
        if name not in listed:
            return f"{path} does not list {name}"
        file, (size, digest) = folder / name, listed[name]
        actual = file.stat().st_size if file.is_file() else None
        if actual != size:
            return f"{file} is missing" if actual is None else f"{file} has {actual} bytes instead of {size}"
        if name in wanted and sha256(file) != digest:
            return f"{file} is damaged: its SHA-256 is not the recorded one"

    with ThreadPoolExecutor(4) as pool:
        return meta, [found for found in pool.map(fault, [*listed, *sorted(wanted - listed.keys())]) if found]


def check_types(meta: dict[str, Any]) -> None:
    """ValueError for facts in checkpoint.json that are missing or not of their type, which its digest does not show."""
    if "sha256" not in meta:
        raise ValueError("it has no sha256")
    if type(meta["step"]) is not int or not 0 <= meta["step"] < 1 << 63:
        raise ValueError(f"step={meta['step']!r}")
    names = meta.get("class_names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("class_names is not a list of names")
    empty = meta.get("empty_classes", [])
    if not isinstance(empty, list) or not all(type(label) is int for label in empty):
        raise ValueError("empty_classes is not a list of numbers")
    for name, entry in meta["files"].items():
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            raise ValueError(f"it lists {name} without bytes and sha256")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"it lists {name}, which is in another folder")


def newest_good(run_dir: Path, ranks: Ranks, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose every file is as it was written, None for a run without any; a collective call.

    `say` hears about the damaged ones that are passed over. ValueError when there are only damaged ones.
    """
    found, good = checkpoints(run_dir)[::-1], 0
    while ranks.is_main and good < len(found) and (faults := inspect(found[good])[1]):
        say(f"checkpoint file {faults[0]}; trying the checkpoint before it")
        good += 1
    good = int(ranks.gather(torch.tensor([good], device=ranks.device))[0])  # what the main process found
    if found and good == len(found):
        raise ValueError(f"run_dir={run_dir} holds only damaged checkpoints; see fastdit verify {found[0]}")
    return found[good] if found else None


def check_run_dir(run_dir: Path, resume: bool) -> None:
    """ValueError unless a run may write here: into a new or empty folder, or, to resume, into one that a run began."""
    if (run_dir / META).is_file():
        raise ValueError(
            f"run_dir={run_dir} is a checkpoint, not a run, and training would overwrite it; choose another run_dir, "
            f"with training.init_from={run_dir} to start from its weights"
        )
    if not run_dir.is_dir() or not any(path.name != "lock" for path in run_dir.iterdir()):
        return
    if not resume:
        raise ValueError(f"run_dir={run_dir} is not empty; continue with --resume, or choose another run_dir=...")
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"run_dir={run_dir} holds files, but no run that could be resumed; choose another run_dir=...")


def find(path: Path) -> Path:
    """The checkpoint folder at `path`: itself, or the newest one of a run folder."""
    path = Path(path)
    if (path / META).is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"checkpoint {path} does not exist; give a run folder or one of its checkpoints/step-*")
    found = checkpoints(path)
    if not found:
        raise ValueError(f"{path} holds no complete checkpoint; give a run folder or one of its checkpoints/step-*")
    return found[-1]


def run_of(folder: Path) -> Path:
    """The run that a checkpoint belongs to; a folder elsewhere, such as one of `fastdit ema`, is a run of its own."""
    return folder.parents[1] if folder.parent.name == "checkpoints" else folder
