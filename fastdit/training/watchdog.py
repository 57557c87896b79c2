"""Names the process that stalls or dies, with the stack of every process, and ends the run.

Each process has a thread that writes run_dir/stacks/rank-00000.json every few seconds: its step, what it is doing, and
a count that shows that it is alive. In a collective all wait for the slowest, so the process that is furthest behind,
or whose count stands still, is the one to blame.
"""

import json
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastdit.distributed import Ranks
from fastdit.errors import is_lost
from fastdit.files import read_json, read_text, replace_text
from fastdit.lock import MACHINE, started, this_process

LAST_SEEN = "died or does not run; it was last seen before"
OTHERS = "\nother threads:\n"
PHASES = ("reads a batch", "computes", "logs or saves", "validates, samples or evaluates")  # of a step, in this order
READS, COMPUTES, LOGS, MONITORS = range(len(PHASES))


class Watchdog:
    """Call `at` as the run moves on. A context manager: an error inside it names the process that died, if one did."""

    def __init__(self, run_dir: Path, ranks: Ranks, timeout_s: float):
        self.folder, self.ranks, self.timeout_s = run_dir / "stacks", ranks, timeout_s
        self.interval, self.own = min(5.0, timeout_s / 20), this_process()
        self.place, self.since, self.beats = (0, 0), time.monotonic(), 0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def at(self, step: int, phase: int) -> None:
        """This process is about to do PHASES[phase] of step number `step`."""
        self.place, self.since = (step, phase), time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(f"rank-{self.ranks.rank:05d}.*"):
            path.unlink()  # of an earlier run
        self._beat()
        self.thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.done.set()
        self.thread.join()
        if is_lost(error) and self.ranks.world > 1 and (dead := self._dead()):
            raise ValueError(self._sentence(dead, LAST_SEEN, self.place[0] + 1)) from error
        if error is None or kind is SystemExit:
            for path in self.folder.glob(f"rank-{self.ranks.rank:05d}.*"):
                path.unlink()
            with suppress(OSError):  # not empty yet
                self.folder.rmdir()

    def _watch(self) -> None:
        while not self.done.wait(self.interval):
            self._beat()
            if time.monotonic() - self.since > self.timeout_s - 4 * self.interval:  # the time that a report takes
                self._report()

    def _beat(self) -> None:
        self.beats += 1
        own = {"rank": self.ranks.rank, **self.own, "place": self.place, "beats": self.beats}
        with suppress(OSError):  # the disk is full: the run itself says so, and ends
            replace_text(self._path(".json"), json.dumps(own))

    def _report(self) -> None:
        """Write this process's stacks; the lowest rank alive names the one that is behind. Ends the process."""
        with suppress(OSError):
            self._path(".txt").write_text(stacks())
        dead = self._dead()  # takes some intervals, in which the others write their stacks
        alive = [status for status in self._statuses() if status not in dead]
        last = min((status["place"] for status in alive), default=self.place)
        if dead:
            line = self._sentence(dead, LAST_SEEN, last[0] + 1)
        else:
            behind = [status for status in alive if status["place"] == last]
            what = f"no progress for {self.timeout_s:.0f} s (training.timeout_s) while it {PHASES[last[1]]} in"
            line = self._sentence(behind, what, last[0])
        if not alive or alive[0]["rank"] == self.ranks.rank:  # none: the disk was full from the start
            for path in sorted(self.folder.glob("rank-*.txt")):
                with suppress(OSError, ValueError):  # the line below must come out whatever this file is
                    print(f"{path.stem}, {read_text(path).partition(OTHERS)[0]}", file=sys.stderr)
            print("error:", line, file=sys.stderr, flush=True)
        else:
            time.sleep(self.interval)  # the launcher ends the others when one ends: let it speak first
        os._exit(1)

    def _statuses(self) -> list[dict[str, Any]]:
        found = []
        for path in sorted(self.folder.glob("rank-*.json"))[: self.ranks.world]:
            try:
                found.append(read_json(path))
            except (OSError, ValueError):  # just being replaced
                continue
        return found

    def _dead(self) -> list[dict[str, Any]]:
        """The processes that do not exist anymore, or show no sign of life within three intervals."""
        before = {status["rank"]: status for status in self._statuses()}
        here = [status for status in before.values() if all(status.get(key) == self.own[key] for key in MACHINE)]
        gone = [status for status in here if started(status["pid"]) != status["started"]]
        if gone:
            return gone
        for _ in range(3):
            time.sleep(self.interval)
            self._beat()
        still = [s for s in self._statuses() if s["beats"] == before.get(s["rank"], {}).get("beats")]
        return [s for s in still if s["rank"] != self.ranks.rank]

    def _sentence(self, those: list[dict[str, Any]], what: str, step: int) -> str:
        names = ", ".join(f"rank {status['rank']} (process {status['pid']} on {status['host']})" for status in those)
        others = "" if len(those) == self.ranks.world else "; the others wait for it"
        return f"{names}: {what} step {step}{others}. All stacks: {self.folder}. Continue with --resume"

    def _path(self, suffix: str) -> Path:
        return self.folder / f"rank-{self.ranks.rank:05d}{suffix}"


def stacks() -> str:
    """The stack of the main thread, then those of the other threads of this process."""
    frames = sys._current_frames()
    main = frames.pop(threading.main_thread().ident)
    others = "\n".join("".join(traceback.format_stack(frame)) for frame in frames.values())
    return f"main thread:\n{''.join(traceback.format_stack(main))}{OTHERS}{others}"
