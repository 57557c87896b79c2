"""A lock on a folder that several machines may share: one writer at a time, and a dead one's lock is taken over.

The lock is a file that only one process can create. It names the host and the process, and its holder rewrites a
counter in it every few seconds. On the same machine a holder is alive if its process is. From another one, or from
another container, it is alive if the counter moves: clocks and cached file times of a network file system are not
trusted. Machines may share a host name, as `localhost` and clones do.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fastdit.errors import EXIT_CODE, make_folder
from fastdit.files import read_json, replace_text

BEAT_S, PATIENCE_S = 5.0, 30.0
WRITE_S, TURN_S = 1.0, 60.0  # the longest time to write a lock, and to remove that of a dead process
MACHINE = "host", "boot", "processes"  # where a process number means the same process


class FolderLock:
    """Held inside `with`, in <folder>/lock; ValueError that names host and process where another one holds it.

    The folder is made where it does not exist, and removed again if nothing was written. `key` is its name in messages.
    """

    def __init__(self, folder: Path, key: str, say: Callable[[str], None] = print):
        self.folder, self.path, self.what, self.say = folder, folder / "lock", f"{key}={folder}", say
        self.own = this_process()
        self.ended = threading.Event()

    def __enter__(self) -> "FolderLock":
        make_folder(self.folder, self.what.partition("=")[0])
        while not self._create(self.path):
            holder = self._read(self.path)
            if not holder:  # it may have been created a moment ago, and not written yet
                time.sleep(WRITE_S)
                holder = self._read(self.path)
            if holder and self._alive(holder):
                raise ValueError(
                    f"{self.what} is in use by process {holder.get('pid')} on {holder.get('host')}; stop it first "
                    f"(or remove {self.path} if that process no longer exists)"
                )
            if self._remove(holder) and holder:
                self.say(f"{self.what}: took over the lock of process {holder.get('pid')} on {holder.get('host')}, "
                         "which is gone")  # fmt: skip
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.thread.join()
        if {k: self._read(self.path).get(k) for k in self.own} == self.own:
            self.path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def _create(self, path: Path) -> bool:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            json.dump({**self.own, "beat": 0}, file)
        return True

    def _remove(self, holder: dict) -> bool:
        """Remove the lock if it is still that of `holder`; of several processes that found it stale, one at a time."""
        turn = self.path.with_name("lock.takeover")
        if not self._create(turn):
            time.sleep(0.1)
            other = self._read(turn)
            with suppress(FileNotFoundError):
                old = abs(time.time() - turn.lstat().st_mtime) > TURN_S
                if old or self._is_near(other) and not self._runs(other):  # its process died in here
                    turn.unlink()
            return False
        try:
            mine = self._read(self.path) == holder
            if mine:
                self.path.unlink(missing_ok=True)
            return mine
        finally:
            turn.unlink(missing_ok=True)

    def _read(self, path: Path) -> dict:
        try:
            holder = read_json(path)
        except (OSError, ValueError):  # gone, or being written
            return {}
        return holder if {"host", "pid", "started"} <= holder.keys() else {}

    def _is_near(self, holder: dict) -> bool:
        return all(holder.get(key) == self.own[key] for key in MACHINE)

    def _runs(self, holder: dict) -> bool:
        return holder["started"] == started(holder["pid"])

    def _alive(self, holder: dict) -> bool:
        if self._is_near(holder):
            return self._runs(holder)
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            time.sleep(min(1.0, PATIENCE_S / 10))
            if self._read(self.path) != holder:
                return True
        return False

    def _beat(self) -> None:
        beat = 0
        while not self.ended.wait(BEAT_S):
            beat += 1
            holder = self._read(self.path)  # {} where a network file system is away for a moment
            if holder and {k: holder.get(k) for k in self.own} != self.own:
                who = f"process {holder.get('pid')} on {holder.get('host')}"
                print(f"error: {self.what} was taken over by {who} while this process was suspended, so it ends here",
                      file=sys.stderr, flush=True)  # fmt: skip
                os._exit(EXIT_CODE)  # at once, as by a kill: both would write to the folder
            with suppress(OSError):  # a full disk, or a network file system that is away for a moment: it may come back
                replace_text(self.path, json.dumps({**self.own, "beat": beat}))


def this_process() -> dict[str, str | int | None]:
    """This process, and the machine and container (MACHINE) that its number belongs to."""
    boot, processes = "", ""
    with suppress(OSError):  # no /proc, as on macOS
        boot, processes = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")
    own = {"pid": os.getpid(), "started": started(os.getpid())}
    return {"host": socket.gethostname(), "boot": boot, "processes": processes, **own}


def process_fields(pid: int) -> list[str]:
    """What the kernel reports of a process: its state, its parent, ...; [] without such a process, or without /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def started(pid: int) -> str | None:
    """When a process of this host started, as the kernel reports it; None if there is no such process, or a zombie."""
    if len(fields := process_fields(pid)) > 19:
        return None if fields[0] == "Z" else fields[19]
    try:
        os.kill(pid, 0)  # no /proc, as on macOS: only its existence can be checked
        return "unknown"
    except (OSError, OverflowError, TypeError):
        return None
