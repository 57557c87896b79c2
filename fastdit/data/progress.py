"""What an extraction has finished: after it was killed, the same command continues with the shards that are missing."""

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastdit.data.writer import partial_folder, prepare, write_synced
from fastdit.errors import OtherFailed
from fastdit.files import read_json, sha256

OTHER_FAILED = "another process of this extraction has failed; see its message"
SAYS = {"images": "the images", "vae": "the weights of the autoencoder", "weights": "the weights of the encoder",
        "latents": "the latents"}  # of settings that are hashes  # fmt: skip


class Progress:
    """<out>.partial with the shards and <out>.writing with settings.json and a part file for each finished shard.

    Nothing but the parts says that a shard is finished. They are not in <out>.partial because that becomes <out>.
    """

    def __init__(self, out: Path):
        self.out, self.partial = out, partial_folder(out)
        self.folder = out.with_name(f"{out.name}.writing")
        self.failed, self.settings = self.folder / "failed", self.folder / "settings.json"

    def begin(self, settings: dict[str, Any], shards: int, say: Callable[[str], None]) -> None:
        """Keeps the intact shards that a run with the same settings finished, and removes what else it left.

        Says what is kept, or why nothing is.
        """
        before = self._read(self.settings)
        changed = [key for key, value in settings.items() if before.get(key) != value]
        kept = [] if changed else [number for number in sorted(self.done()) if self._intact(number)]
        if changed:
            self.clear()
        if not kept:
            prepare(self.out)
        for path in self.folder.glob("shard-*.part"):
            if self._number(path) not in kept:
                path.unlink()
        names = {f"{self._part(number).stem}.tar" for number in kept}
        for path in self.partial.iterdir():
            if path.name not in names:
                path.unlink()
        self.failed.unlink(missing_ok=True)
        write_synced(self.settings, json.dumps(settings).encode())
        if before and changed:
            what = ", ".join(SAYS.get(key) or f"{key} ({before.get(key)}, now {settings[key]})" for key in changed)
            say(f"an unfinished extraction to {self.out} used other settings and starts again; changed: {what}")
        elif kept:
            say(f"continuing an unfinished extraction: {len(kept)} of {shards} shards are finished and kept")

    def done(self) -> set[int]:
        """The numbers of the finished shards."""
        return {self._number(path) for path in self.folder.glob("shard-*.part")}

    def finish(self, number: int, part: dict[str, Any]) -> None:
        """Records that a shard is complete, with what `publish` needs of it."""
        write_synced(self._part(number), json.dumps(part).encode())

    def parts(self, shards: int) -> list[dict[str, Any]]:
        """What `finish` got, of all shards."""
        return [read_json(self._part(number)) for number in range(shards)]

    def wait(self, shards: int) -> None:
        """Returns when all shards are finished; ValueError if another process fails."""
        while len(self.done()) < shards:
            if self.failed.exists() or not self.partial.is_dir():
                raise OtherFailed(OTHER_FAILED)
            time.sleep(0.2)

    def abandon(self, shards: int, say: Callable[[str], None], keep: bool) -> None:
        """After an error: with `keep`, keeps the finished shards for the next run; otherwise removes everything."""
        kept = len(self.done()) if keep else 0
        if kept:
            if not self.failed.exists() and self.partial.is_dir():
                say(f"{kept} of {shards} shards are kept in {self.partial}; the same command continues with the others")
            with suppress(OSError):
                self.failed.touch()
            return
        renamed = self.partial.with_name(f"{self.partial.name}-{os.getpid()}")
        with suppress(OSError):  # never created, or already removed by another process
            self.partial.rename(renamed)  # first, so that no other process adds a file during the removal
        shutil.rmtree(renamed, ignore_errors=True)
        self.clear()

    def clear(self) -> None:
        """Removes the records; settings first, without which the rest counts for nothing."""
        for path in (self.settings, self.failed, *self.folder.glob("s*.part"), *self.folder.glob("s*.new")):
            path.unlink(missing_ok=True)

    def _part(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.part"

    @staticmethod
    def _number(part: Path) -> int:
        return int(part.stem.removeprefix("shard-"))

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            return read_json(path)
        except (OSError, ValueError):
            return {}

    def _intact(self, number: int) -> bool:
        """Whether a finished shard is still as it was written."""
        shard = self._read(self._part(number)).get("shard", {})
        try:
            path = self.partial / shard["name"]
            return sha256(path) == shard["sha256"] and path.stat().st_size == shard["bytes"]
        except (OSError, LookupError, TypeError, ValueError):
            return False
