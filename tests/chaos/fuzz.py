"""Table 8: mutated files of every kind that is read (subjects.py, mutate.py), in a process that is watched.

    PYTHONPATH=.:tests python -m chaos.fuzz [--count 10000] [--seed 0] [--case N] [--only KIND] [--keep DIR]

Case N is a function of (seed, N) alone: `--case N --keep DIR` repeats it, prints its traceback and keeps its files.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, as in tests/conftest.py
os.environ |= {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}

import fastdit  # noqa: F401, I001  before torch: it sets how OpenMP's threads wait

import argparse
import contextlib
import faulthandler
import io
import multiprocessing
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from chaos import mutate
from chaos.subjects import SUBJECTS, Silent, seal
from chaos.table import Table
from chaos.watched import EXECUTED, HANGS, LIMIT_S, MEMORY, OUTSIDE, hook
from fastdit.errors import friendly_exit

COUNT, WALL_S = 10_000, 60.0  # a file that blocks uses no CPU
VARIANTS = 8  # good files of each kind, as some makers draw theirs
READ, REFUSED = "read", "refused"
CRASHES, OTHERS, BLOW_UPS, UNNAMED, SILENT = "crashes", "other errors", "memory", "file not named", "silently used"
FAULTS = (EXECUTED, OUTSIDE, HANGS, CRASHES, OTHERS, BLOW_UPS, UNNAMED, SILENT)
NORMAL_ENDS = {signal.SIGPROF: HANGS, signal.SIGALRM: HANGS}


@dataclass
class End:
    """How a case ended: READ, REFUSED or one of FAULTS; what was said; CPU seconds."""

    number: int
    kind: str
    how: str
    said: str = ""
    seconds: float = 0.0
    changed: list[str] = field(default_factory=list)  # the names of the files


def run(place: Path, seed: int, count: int = COUNT) -> Table:
    table = Table(
        "Mutated files",
        f"{count} cases: up to two files of a small good source are changed by up to three mutations each, of random "
        "bytes or of the format's own structure, and are read in a process with "
        f"{MEMORY >> 30} GiB of address space and an audit hook as for the hostile files. A case is *read*, or "
        "*refused* as a command refuses it: one line that begins with `error:` and names the file. *Silently used*: "
        "changed bytes of shards reached a batch, or `fastdit verify` did not find them. A case hangs "
        f"if it takes over {LIMIT_S:g} s of CPU, or {WALL_S:g} s.",
        ["kind", "cases", READ, REFUSED, *FAULTS, "slowest"],
    )
    ends = []
    for end in fuzzed(place / "fuzz", seed, range(count)):
        ends.append(end)
        told = f"case {end.number} of seed {seed}, {end.kind}, {end.changed}: {end.how}: {end.said}"
        table.check(end.how not in FAULTS, told.encode(errors="replace").decode())
    for kind in SUBJECTS:
        own = [end for end in ends if end.kind == kind]
        hows = [end.how for end in own]
        slowest = max((end.seconds for end in own), default=0)
        table.rows.append([kind, len(own), *(hows.count(how) for how in (READ, REFUSED, *FAULTS)), f"{slowest:.1f} s"])
    return table


def fuzzed(root: Path, seed: int, numbers: Iterable[int], kinds: Iterable[str] = tuple(SUBJECTS)) -> Iterator[End]:
    """Runs the cases in a process, and in another one after it where a case has ended it."""
    kinds, left, forks = [*kinds], [*numbers], multiprocessing.get_context("fork")
    maker = forks.Process(target=prepare, args=(root / "good", kinds))  # pyarrow's threads do not survive a fork
    maker.start()
    maker.join()
    assert maker.exitcode == 0
    while left:
        ours, theirs = forks.Pipe(duplex=False)
        process = forks.Process(target=work, args=(root, seed, left, kinds, theirs))
        process.start()
        theirs.close()
        started: End | None = None
        with contextlib.suppress(EOFError):
            while True:
                end = ours.recv()
                if end.how:
                    yield end
                    left = left[1:]
                    started = None
                else:
                    started = end
        process.join()
        if left and started is None:
            raise RuntimeError(f"the process ended between cases, with {process.exitcode}")
        if started:
            how = NORMAL_ENDS.get(-process.exitcode, CRASHES)
            yield End(started.number, started.kind, how, f"exit code {process.exitcode}", LIMIT_S, started.changed)
            left = left[1:]


def prepare(root: Path, kinds: Iterable[str]) -> None:
    for kind in kinds:
        for variant in range(VARIANTS if kind in VARIED else 1):
            folder = root / kind / str(variant)
            folder.mkdir(parents=True)
            (folder / ".path").write_text(str(SUBJECTS[kind].make(folder).relative_to(folder)))


VARIED = ("images", "images of an evaluation", "Parquet of other types", "config")


def work(root: Path, seed: int, numbers: list[int], kinds: list[str], pipe) -> None:
    """The body of the process."""
    faulthandler.disable()  # the parent reports a crash; pytest enables it
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.dont_write_bytecode = True
    case, watching = root / "case", [False]
    (case / "tmp").mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = str(case / "tmp")
    events = os.open(root / "events", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    audit = hook(events, (f"{case.resolve()}/out/", f"{case.resolve()}/tmp/", "/dev/null"))
    sys.addaudithook(lambda event, arguments: audit(event, arguments) if watching[0] else None)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in numbers:
        pipe.send(attempt(root, case, seed, number, kinds, events, watching, pipe))
    pipe.close()
    os._exit(0)  # without the interpreter's end: threads of a case may still wait


def attempt(root: Path, case: Path, seed: int, number: int, kinds: list[str], events: int, watching: list, pipe) -> End:
    """Makes case `number` below `case`, reads it, and says how that ended."""
    draw = random.Random(f"{seed} {number}")
    kind = kinds[number % len(kinds)]
    subject = SUBJECTS[kind]
    shutil.rmtree(case, ignore_errors=True)
    for name in ("out", "tmp", "cwd"):
        (case / name).mkdir(parents=True)
    good = draw.choice(sorted((root / "good" / kind).iterdir()))
    shutil.copytree(good, case / "in", ignore=shutil.ignore_patterns(".path"))
    changed = change(case / "in", kind, draw)
    relative = (good / ".path").read_text()
    whole = None if subject.digests and draw.random() < 0.5 else good / relative
    if whole is None:
        seal(case / "in" / relative)
    before, seen = state(root, case), os.fstat(events).st_size
    pipe.send(End(number, kind, "", changed=changed))
    os.chdir(case / "cwd")
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)  # both signals end the process, wherever it is
    signal.setitimer(signal.ITIMER_REAL, WALL_S)
    start, watching[0] = time.process_time(), True
    try:
        how, said = outcome(lambda: subject.read(case / "in" / relative, case / "out", whole))
    finally:
        watching[0] = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.process_time() - start
    os.chdir(root)
    if how == REFUSED and not any(name in said for name in (str(case), *map(os.path.basename, changed))):
        how = UNNAMED
    if state(root, case) != before:
        how, said = OUTSIDE, f"a file beside the output folder; {said}"
    if (case / "cwd" / "canary").exists():
        how, said = EXECUTED, f"the payload has run; {said}"
    elif told := os.pread(events, 4096, seen):
        how, said = told.decode(errors="replace").split("\t", 1)
    return End(number, kind, how, said, seconds, changed)


def change(folder: Path, kind: str, draw: random.Random) -> list[str]:
    """Mutates one or two files in a folder; their names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if special := [path for path in files if path.suffix.lower() not in (".png", ".txt")]:  # not the images of a list
        files = special if draw.random() < 0.85 else files
    taken = draw.sample(files, min(len(files), draw.choice((1, 1, 1, 2))))
    for path in taken:
        path.write_bytes(mutate.mutate(path.name, path.read_bytes(), draw))
    return [str(path.relative_to(folder)) for path in taken]


def state(root: Path, case: Path) -> list:
    """What must not change: the entries beside the case, and its input."""
    files = [*root.iterdir(), *case.iterdir(), *(case / "cwd").iterdir(), *(case / "in").rglob("*")]
    return sorted((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files
                  if f.name not in ("events", "out", "tmp", "canary"))  # fmt: skip


def outcome(read) -> tuple[str, str]:
    """How a reader ends, as a command would."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), friendly_exit():
            read()
    except SystemExit as end:
        lines = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
        line = lines[-1] if lines else ""
        if isinstance(end.__cause__, MemoryError):
            return BLOW_UPS, line + traces(end)
        return (REFUSED, line) if end.code == 2 and len(lines) == 1 else (OTHERS, f"exit code {end.code}: {lines}")
    except Silent as error:
        return SILENT, str(error)
    except BaseException as error:  # a panic of Rust code is no Exception
        return OTHERS, traces(error)
    return READ, ""


def traces(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-3000:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--only", action="append", help="a kind of files (default: all)")
    parser.add_argument("--keep", type=Path, help="a new folder for the files (default: a temporary one)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        place = arguments.keep or Path(folder)
        if arguments.case is not None:
            for end in fuzzed(place / "fuzz", arguments.seed, [arguments.case], arguments.only or SUBJECTS):
                print(f"{end.kind}, {end.changed}: {end.how}, {end.seconds:.2f} s\n{end.said}")
            return 0
        start = time.perf_counter()
        table = run(place, arguments.seed, arguments.count)
        table.seconds = time.perf_counter() - start
    print(table.markdown())
    return int(bool(table.failures))


if __name__ == "__main__":
    sys.exit(main())
