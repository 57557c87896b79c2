"""Frames of the 16 games of procgen (Cobbe et al. 2020, arXiv 1912.01588; PyPI, MIT), 64 px, from its C library.

The newest wheel is for Python 3.10. Its library needs no Python at all: it has the C interface of gym3's libenv.h,
which is bound here with ctypes. The wheel is only unpacked, and neither gym nor gym3 is needed.
"""

import ctypes
import hashlib
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from ctypes import POINTER, c_bool, c_char, c_int, c_void_p
from pathlib import Path

import numpy as np

GAMES = ("bigfish", "bossfight", "caveflyer", "chaser", "climber", "coinrun", "dodgeball", "fruitbot",
         "heist", "jumper", "leaper", "maze", "miner", "ninja", "plunder", "starpilot")  # fmt: skip
SIZE = 64  # pixels
ACTIONS = 15
RESET = -1  # an action that begins a new level
HOLD = 4  # steps for which an action is held, so that the player moves away
STEPS = 200  # a frame is taken after 1 to STEPS steps
PARALLEL = 50  # levels that are played at once; frames depend on it
EASY, HARD = 0, 1  # distribution modes: hard levels have smaller details
MODES = dict.fromkeys(GAMES, EASY) | {"coinrun": HARD}  # whose easy levels all have one background
SPLITS = {"train": (0, 1_000_000_000), "held_out": (1_000_000_000, 1_000_000_000)}  # first level, number of levels

DOWNLOAD = ("procgen==0.10.7", "--no-deps", "--only-binary=:all:", "--python-version=3.10",
            "--platform=manylinux2014_x86_64")  # fmt: skip
WHEEL_HASH = "4b594d14e42f0f2166e59a9e294477b906eb99c90c3343b570b7124cbc865f53"
UINT8, INT32 = 1, 2  # LIBENV_DTYPE_*
OBSERVATION, ACTION, INFO = 1, 2, 3  # LIBENV_SPACE_*
MAKING = threading.Lock()  # the first environment of a process reads the pictures


class Option(ctypes.Structure):
    _fields_ = [("name", c_char * 128), ("dtype", c_int), ("count", c_int), ("data", c_void_p)]


class Options(ctypes.Structure):
    _fields_ = [("items", POINTER(Option)), ("count", c_int)]


class Tensors(ctypes.Structure):
    _fields_ = [("name", c_char * 128), ("scalar_type", c_int), ("dtype", c_int), ("shape", c_int * 16),
                ("ndim", c_int), ("low", c_int), ("high", c_int)]  # fmt: skip


class Buffers(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("ob", "rew", "first", "info", "ac")]


def unpack(folder: Path, wheel: Path | None = None) -> Path:
    """The folder of procgen's library and pictures below `folder`, unpacked from `wheel` (None: pip downloads it)."""
    if (folder / "procgen").is_dir():
        return folder / "procgen" / "data"
    if wheel is None:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "-d", str(folder), *DOWNLOAD], check=True)
        [wheel] = folder.glob("procgen-*.whl")
    with wheel.open("rb") as file:
        if (found := hashlib.file_digest(file, "sha256").hexdigest()) != WHEEL_HASH:
            remedy = f"pip download {' '.join(DOWNLOAD)}"
            raise ValueError(f"--wheel={wheel} has SHA-256 {found}, not {WHEEL_HASH}; {remedy}")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith("procgen/data/")])
    return folder / "procgen" / "data"


class Levels:
    """`count` levels of one game that are played at once, each followed by another one from the same split."""

    def __init__(self, data: Path, game: str, split: str, count: int, seed: int):
        lib = self.lib = ctypes.CDLL(str(data / "prebuilt" / "libenv.so"))
        lib.libenv_make.restype, lib.libenv_make.argtypes = c_void_p, [c_int, Options]
        lib.libenv_get_tensortypes.argtypes = [c_void_p, c_int, c_void_p]
        lib.libenv_set_buffers.argtypes = [c_void_p, c_void_p]
        for name in ("libenv_observe", "libenv_act", "libenv_close"):
            getattr(lib, name).argtypes = [c_void_p]
        first, levels = SPLITS[split]
        given = {
            "env_name": game, "resource_root": f"{data / 'assets'}/", "distribution_mode": MODES[game],
            "start_level": first, "num_levels": levels, "use_sequential_levels": False, "rand_seed": seed,
            "num_actions": ACTIONS, "num_threads": 1, "debug_mode": 0, "render_human": False, "center_agent": True,
            "use_backgrounds": True, "use_generated_assets": False, "use_monochrome_assets": False,
            "restrict_themes": False, "paint_vel_info": False,
        }  # fmt: skip
        stated, values = zip(*(_option(name, value) for name, value in given.items()), strict=True)
        options = (Option * len(stated))(*stated)
        with MAKING:
            self.env = lib.libenv_make(count, Options(options, len(stated)))

        self.frames = np.zeros((count, SIZE, SIZE, 3), np.uint8)
        self.actions = np.zeros(count, np.int32)
        self.first = np.zeros(count, np.uint8)  # 1 where a new level has begun
        self.rewards = np.zeros(count, np.float32)
        self.level, before, complete = (np.zeros(count, kind) for kind in (np.int32, np.int32, np.uint8))
        known = {"rgb": self.frames, "action": self.actions, "level_seed": self.level, "prev_level_seed": before,
                 "prev_level_complete": complete}  # fmt: skip
        spaces = [self._pointers(space, known) for space in (OBSERVATION, INFO, ACTION)]
        observed, info, acted = (ctypes.cast(pointers, c_void_p) for pointers in spaces)
        buffers = Buffers(observed, self.rewards.ctypes.data, self.first.ctypes.data, info, acted)
        lib.libenv_set_buffers(self.env, ctypes.byref(buffers))
        self.kept = [values, options, known, spaces, buffers]  # the library reads and writes them

    def _pointers(self, space: int, known: dict[str, np.ndarray]) -> ctypes.Array:
        """The address of each level's part of each tensor in a space of the interface."""
        kinds = (Tensors * self.lib.libenv_get_tensortypes(self.env, space, None))()
        self.lib.libenv_get_tensortypes(self.env, space, kinds)
        arrays = [known[kind.name.decode()] for kind in kinds]
        addresses = [array[level : level + 1].ctypes.data for array in arrays for level in range(len(array))]
        return (c_void_p * len(addresses))(*addresses)

    def step(self, actions: np.ndarray) -> None:
        """Act; `frames`, `first` and `level` are then those after it."""
        self.actions[:] = actions
        self.lib.libenv_act(self.env)
        self.lib.libenv_observe(self.env)

    def close(self) -> None:
        self.lib.libenv_close(self.env)


def _option(name: str, value: str | bool | int) -> tuple[Option, object]:
    """The library's option, and what it points to, which must be kept."""
    if isinstance(value, str):
        data, kind, count = ctypes.create_string_buffer(value.encode()), UINT8, len(value)
    elif isinstance(value, bool):
        data, kind, count = c_bool(value), UINT8, 1
    else:
        data, kind, count = c_int(value), INT32, 1
    return Option(name.encode(), kind, count, ctypes.addressof(data)), data


def frames(data: Path, game: str, split: str, count: int, seed: int = 0) -> Iterator[np.ndarray]:
    """`count` frames uint8 (64, 64, 3) of as many levels, taken at a random step of a player who acts at random."""
    random = np.random.default_rng([seed, GAMES.index(game), [*SPLITS].index(split)])
    levels = Levels(data, game, split, PARALLEL, int(random.integers(1 << 31)))
    try:
        taken, seen = 0, set()
        levels.lib.libenv_observe(levels.env)
        due, played = random.integers(1, STEPS, PARALLEL, endpoint=True), np.zeros(PARALLEL, int)
        actions = random.integers(0, ACTIONS, PARALLEL)
        while taken < count:
            held = random.integers(0, ACTIONS, PARALLEL)
            actions = np.where(played % HOLD == 0, held, actions)
            levels.step(np.where(played >= due, RESET, actions))
            played = np.where(levels.first, 0, played + 1)  # a level also ends when the player dies or succeeds
            for i in np.flatnonzero(played == due):
                if taken < count and levels.level[i] not in seen:
                    seen.add(int(levels.level[i]))
                    taken += 1
                    yield levels.frames[i].copy()
            due = np.where(levels.first, random.integers(1, STEPS, PARALLEL, endpoint=True), due)
    finally:
        levels.close()
