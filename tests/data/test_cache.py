"""data.cache_gib: what was read least recently is deleted; never what is in use, and never at the cost of a batch."""

import errno
import multiprocessing
import os
import random
import signal
import time
from collections import namedtuple
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastdit.config import config_from
from fastdit.data import remote
from fastdit.data.loader import latent_batches
from fastdit.data.manifest import Manifest
from fastdit.data.order import WINDOW
from fastdit.data.remote import Cache
from helpers.sets import write

pytestmark = pytest.mark.usefixtures("one_thread")
SHARDS = 12


@pytest.fixture(scope="module")
def there(tmp_path_factory) -> Manifest:
    """120 images in 12 shards of one size."""
    return write(tmp_path_factory.mktemp("there") / "set", 10 * SHARDS)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(remote, "WAITS_S", ())


def cached(there: Manifest, folder: Path, shards: float) -> Manifest:
    """The set through a cache that has room for so many shards and the index."""
    room = shards * there.shards[0].bytes + (there.folder / "index.npy").stat().st_size
    return Manifest.load(f"file://{there.folder}", Cache(folder, room / 2**30))


def content(manifest: Manifest, number: int) -> bytes:
    with open(manifest.open_shard(number), "rb") as file:
        return file.read()


def kept(there: Manifest, folder: Path) -> list[int]:
    """The shards that are in the cache; the times of all are then different, as those of large shards are."""
    for number in sorted(range(SHARDS), key=lambda n: stamp(folder / there.shards[n].sha256)):
        path = folder / there.shards[number].sha256
        with suppress(FileNotFoundError):  # the loader's thread may delete it meanwhile
            os.utime(path, ns=(path.stat().st_mtime_ns - 10**9,) * 2)
    return [number for number, shard in enumerate(there.shards) if (folder / shard.sha256).exists()]


def stamp(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def test_the_shards_that_were_read_least_recently_are_deleted(there, tmp_path):
    manifest = cached(there, tmp_path, 3)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ("a" * 63)).write_text("mine")
    for number, left in ((0, [0]), (1, [0, 1]), (2, [0, 1, 2]), (0, [0, 1, 2]), (3, [0, 2, 3]), (0, [0, 2, 3]),
                         (7, [0, 3, 7])):  # fmt: skip
        assert content(manifest, number) == (there.folder / there.shards[number].name).read_bytes()
        assert kept(there, tmp_path) == left
    assert (tmp_path / "notes.txt").exists() and (tmp_path / ("a" * 63)).exists()
    unlimited = replace(manifest, cache=Cache(tmp_path))
    for number in range(SHARDS):
        content(unlimited, number)
    assert kept(there, tmp_path) == [*range(SHARDS)]


def test_an_open_shard_is_not_deleted(there, tmp_path):
    manifest = cached(there, tmp_path, 2)
    with open(manifest.open_shard(0), "rb") as file:
        for number in range(1, 6):
            content(manifest, number)
            assert kept(there, tmp_path) == [0, number]
        assert file.read() == (there.folder / there.shards[0].name).read_bytes()
    content(manifest, 6)
    assert kept(there, tmp_path) == [5, 6]


def test_batches_through_a_small_cache_are_the_same(there, tmp_path):
    def batches(manifest):
        found = latent_batches(replace(manifest, block=3), global_batch=8, seed=4, prefetch=2)
        try:
            for _ in range(45):  # three epochs
                yield next(found).moments.numpy()
        finally:
            found.close()

    room = WINDOW * (3 / 10 + 1)
    manifest, most = cached(there, tmp_path, room + 0.1), 0
    for ours, local in zip(batches(manifest), batches(there), strict=True):
        np.testing.assert_array_equal(ours, local)
        most = max(most, len(kept(there, tmp_path)))
    assert 4 < most <= room + 1
    with pytest.raises(ValueError, match=r"data.cache_gib=\S+ is less than .* data.block=3 reads at a time; set more$"):
        next(batches(cached(there, tmp_path, room - 1)))
    with pytest.raises(ValueError, match="that a full shuffle reads at a time; set more, or data.block=4096"):
        latent_batches(manifest, global_batch=8, seed=4)


def test_an_index_that_was_deleted_is_fetched_again(there, tmp_path, monkeypatch):
    manifest, fetched = cached(there, tmp_path, 3), remote.fetched
    calls = []

    def gone(*arguments):
        path = fetched(*arguments)
        calls.append(path)
        if len(calls) == 1:
            path.unlink()
        return path

    monkeypatch.setattr("fastdit.data.manifest.fetched", gone)
    np.testing.assert_array_equal(manifest.index(), there.index())
    assert len(calls) == 2


def read_randomly(there: Manifest, manifest: Manifest, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(60):
        number = draw.randrange(SHARDS)
        assert content(manifest, number) == (there.folder / there.shards[number].name).read_bytes()


def test_processes_that_share_a_full_cache_read_the_right_bytes(there, tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=read_randomly, args=(there, cached(there, tmp_path, 3 + seed % 2), seed))
                 for seed in range(4)]  # fmt: skip
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(kept(there, tmp_path)) <= 8 and not [*tmp_path.glob("*.partial")]
    content(cached(there, tmp_path, 1), 0)
    assert kept(there, tmp_path) == [0]


def read_slowly(manifest: Manifest) -> None:
    remote.CHUNK, read = 100, remote._read

    def slow(*arguments):
        time.sleep(0.01)
        return read(*arguments)

    remote._read = slow
    content(manifest, 1)


def test_a_killed_process_loses_nothing_and_leaves_nothing_damaged(there, tmp_path):
    manifest = cached(there, tmp_path, 3)
    content(manifest, 0)
    process = multiprocessing.get_context("fork").Process(target=read_slowly, args=(manifest,))
    process.start()
    partial = tmp_path / f"{there.shards[1].sha256}.partial"
    while not partial.exists() or not partial.stat().st_size:
        time.sleep(0.01)
    content(manifest, 2)  # the one that is being written has its room, and is not deleted
    assert partial.exists() and kept(there, tmp_path) == [0, 2]
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert partial.stat().st_size == there.shards[1].bytes  # mostly zeros
    assert content(manifest, 1) == (there.folder / there.shards[1].name).read_bytes() and not partial.exists()
    partial.write_bytes(b"x" * there.shards[1].bytes)  # of another killed process, for which nobody comes back
    os.utime(partial, ns=(0, 0))
    content(manifest, 3)
    assert kept(there, tmp_path) == [1, 2, 3] and not partial.exists()


def test_a_disk_that_is_full_is_one_line(there, tmp_path, monkeypatch):
    usage = namedtuple("Usage", "total used free")
    manifest = cached(there, tmp_path, 3)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage(10, 10, 1000))
        with pytest.raises(ValueError, match=r"data.cache=.* has 9.31e-07 GiB free, but .*00000.tar needs .*free"):
            content(manifest, 0)
    content(manifest, 0)
    with monkeypatch.context() as patch:  # what is in the cache makes way for it, below the limit as well
        first = there.shards[0]
        free = lambda path: 0 if (path / first.sha256).exists() else first.bytes  # noqa: E731
        patch.setattr("shutil.disk_usage", lambda path: usage(0, 0, free(path)))
        content(manifest, 1)
    assert kept(there, tmp_path) == [1]

    def fails(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(remote, "_copy", fails)
    with pytest.raises(ValueError, match=r"partial cannot be written \(No space left on device\); .* needs more space"):
        content(manifest, 5)
    with pytest.raises(ValueError, match=r"data.cache_gib=\S+ is less than the \S+ GiB of .*shard-00005.tar; use more"):
        content(replace(manifest, cache=Cache(tmp_path, 1e-7)), 5)


@pytest.mark.parametrize(
    ("value", "message"),
    [("-1", "data.cache_gib=-1.0 is out of range; use GiB, or 0"), (".inf", "data.cache_gib=inf is out of range"),
     ("10gb", "data.cache_gib='10gb' must be a number"), (".nan", "data.cache_gib=nan is out of range")],
)  # fmt: skip
def test_a_wrong_limit_is_one_line(value, message):
    with pytest.raises(ValueError, match=message):
        config_from({}, "config.yaml", [f"data.cache_gib={value}"])
