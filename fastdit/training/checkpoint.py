"""Atomic checkpoints: a checkpoint is complete, or it does not exist. training/state.py says what is in one.

Everything is written into `step-0000500.partial`, flushed to disk and renamed; only the rename makes it count.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdit.distributed import Ranks

META = "checkpoint.json"
FULL = 1 << 20  # bytes: with less free space than this, a failed write means a full disk


def save(
    run_dir: Path, step: int, write: Callable[[Path], None], meta: dict[str, Any], ranks: Ranks, keep: int
) -> Path:
    """Have every process `write(folder)` its files, then commit them together; keep the `keep` newest (0: all)."""
    final = run_dir / "checkpoints" / f"step-{step:07d}"
    partial = final.with_suffix(".partial")
    if ranks.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.barrier()
    error = None
    try:
        write(partial)
    except Exception as failure:  # usually a full disk, which torch and safetensors report in their own words
        full = shutil.disk_usage(partial).free < FULL
        error = OSError(errno.ENOSPC, "No space left on device", str(final)) if full else failure
    if ranks.any(error is not None):  # also the barrier: no rename before every file is there
        if ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise error or OSError(f"another process could not write {partial}")
    for path in partial.rglob("*"):
        _flush(path)
    ranks.barrier()
    if ranks.is_main:
        commit(partial, final, {"step": step, **meta})
        for old in checkpoints(run_dir)[:-keep] if keep else []:
            shutil.rmtree(old)
    ranks.barrier()
    return final


def commit(partial: Path, final: Path, meta: dict[str, Any]) -> None:
    """Flush a folder to disk, add checkpoint.json, and rename it to its final name."""
    for path in partial.rglob("*"):
        _flush(path)
    sizes = {str(p.relative_to(partial)): p.stat().st_size for p in sorted(partial.rglob("*")) if p.is_file()}
    (partial / META).write_text(json.dumps({**meta, "files": sizes}, indent=1))
    _flush(partial / META)
    _flush(partial)
    replaced = final.with_suffix(".replaced.partial")
    if final.exists():  # the same step again: the old one is removed only when the new one is complete
        final.rename(replaced)
    partial.rename(final)
    _flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def checkpoints(run_dir: Path) -> list[Path]:
    """All complete checkpoints of a run, sorted by step."""
    found = [path for path in (Path(run_dir) / "checkpoints").glob("step-*") if path.suffix != ".partial"]
    return sorted((p for p in found if (p / META).is_file()), key=lambda p: int(p.name.removeprefix("step-")))


def read_meta(folder: Path) -> dict[str, Any]:
    """checkpoint.json, after checking that every listed file exists and has its full size."""
    if not (folder / META).is_file():
        raise ValueError(f"checkpoint {folder} has no {META}; it is not complete; use another step")
    meta = json.loads((folder / META).read_text())
    for name, size in meta["files"].items():
        path = folder / name
        actual = path.stat().st_size if path.is_file() else 0
        if actual != size:
            raise ValueError(f"checkpoint file {path} has {actual} bytes, not {size}; delete {folder} and resume again")
    return meta


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


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
