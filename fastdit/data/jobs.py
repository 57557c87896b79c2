"""Work on shards that any number of processes share, that may be stopped, and that continues where it stopped."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fastdit import __version__
from fastdit.data.images import Unusable
from fastdit.data.progress import OTHER_FAILED, Progress
from fastdit.distributed import Ranks
from fastdit.errors import OtherFailed, is_no_space, out_of_memory_says
from fastdit.lock import FolderLock


def write_folder(
    out: Path,
    shards: int,
    settings: dict[str, Any],
    ranks: Ranks,
    batch_size: int,
    say: Callable[[str], None],
    *,
    before: Callable[[float], None],
    write: Callable[[Progress, list[int]], None],
    publish: Callable[[Path, list[dict[str, Any]], set[int]], None],
) -> None:
    """Writes a folder of shards: `out` appears once it is complete.

    `before(share)`, on the main process: what to check and say; `share` of the shards is missing. `write(progress,
    numbers)`: writes shards and records them. `publish(partial, parts, written)`, on the main process: completes the
    folder, of which this run has written some shards. Finished shards of a run with the same `settings` are kept.
    """
    progress, held = Progress(out), ExitStack()
    ranks.agree({"shards": shards, "fastdit": __version__, **settings})
    if ranks.is_main:
        held.enter_context(FolderLock(progress.folder, "out"))
    try:
        if ranks.is_main:
            progress.begin(settings, shards, say)
            before(1 - len(progress.done()) / shards)
        ranks.barrier()
        if not progress.partial.is_dir():
            raise ValueError(f"out={out} is not visible to rank {ranks.rank}; write to a disk that all processes share")
        missing = sorted(set(range(shards)) - progress.done())
        ranks.barrier()  # until all have read which are missing
        with out_of_memory_says(f"--batch-size={batch_size} is too large for {ranks.device}: use a smaller one"):
            write(progress, missing[ranks.rank :: ranks.world])
        progress.wait(shards)  # not a collective: processes may finish many minutes apart
        ranks.barrier()
        if ranks.is_main:
            publish(progress.partial, progress.parts(shards), set(missing))
            progress.clear()
        ranks.barrier()
    except BaseException as error:
        gone = not progress.partial.is_dir()
        progress.abandon(shards, say, keep=not isinstance(error, Unusable))
        if isinstance(error, OSError) and is_no_space(error):
            raise ValueError(f"no space left for out={out}; free some or write elsewhere") from error
        if isinstance(error, OSError) and gone and ranks.world > 1:
            raise OtherFailed(OTHER_FAILED) from error
        raise
    finally:
        held.close()
