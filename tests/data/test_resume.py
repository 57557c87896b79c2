"""An extraction that was stopped continues: the same command, the same bytes, nothing done twice."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdit import lock
from fastdit.data import encode, writer
from fastdit.data.manifest import Manifest
from fastdit.data.progress import Progress
from fastdit.distributed import close, init
from helpers.data import tiny_vae, write_digits
from helpers.extraction import files_of, run, thread_ranks
from helpers.runs import ENVIRONMENT, rendezvous

COUNT, SMALL = 90, {"shard_size": 6, "batch_size": 4}  # 15 shards
FORKS = multiprocessing.get_context("fork")  # of this process, which has imported everything


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with images/, one of which cannot be read, vae/, and out/ as one process writes it without a stop."""
    base = tmp_path_factory.mktemp("resume")
    write_digits(base / "images", COUNT)
    next((base / "images" / "3").iterdir()).write_bytes(b"no image")
    tiny_vae().save_pretrained(base / "vae")
    run(base, base / "out", **SMALL)
    return base


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """The sizes of the batches that are encoded while the test runs."""
    sizes, encode_both = [], encode.encode_both

    def counting(codec, crops, *arguments):
        sizes.append(len(crops))
        return encode_both(codec, crops, *arguments)

    monkeypatch.setattr(encode, "encode_both", counting)
    return sizes


def extract_forked(base: Path, out: Path, world: dict, log: Path) -> None:
    """The body of one process of an extraction."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 2)
    os.environ |= ENVIRONMENT | world
    torch.set_num_threads(1)
    ranks = init("cpu")
    try:
        run(base, out, ranks=ranks, **SMALL)
    finally:
        close()


def attempt(base: Path, out: Path, processes: int, kill_after: float | None, logs: Path) -> tuple[float, set[int]]:
    """Runs an extraction in forked processes and kills all of them after a while; seconds, exit codes."""
    store, world = rendezvous()
    world |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    forks = []
    for rank in range(processes):
        here = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        forks.append(FORKS.Process(target=extract_forked, args=(base, out, here, logs / f"{rank}.log")))
    start = time.perf_counter()
    for fork in forks:
        fork.start()
    for fork in forks:
        fork.join(None if kill_after is None else max(0, start + kill_after - time.perf_counter()))
    seconds = time.perf_counter() - start
    for fork in forks:
        fork.kill()
        fork.join()
    return seconds, {fork.exitcode for fork in forks}


@pytest.mark.parametrize(("processes", "kills"), [(1, 20), (2, 10)])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(made, tmp_path, monkeypatch, processes, kills):
    monkeypatch.setattr(lock, "WRITE_S", 0.02)  # less than an attempt: each must get the lock of the one before it
    monkeypatch.setattr(lock, "TURN_S", 0.2)
    chance, out, killed, kept = random.Random(processes), tmp_path / "out", 0, 0
    whole, codes = attempt(made, out, processes, None, tmp_path)
    assert codes == {0} and files_of(out) == files_of(made / "out")
    while killed < kills or not out.exists():
        if out.exists():
            shutil.rmtree(out)
            whole *= 0.95  # it was done before its turn: the machine is faster now
        _, codes = attempt(made, out, processes, chance.uniform(0, 1) * whole if killed < kills else None, tmp_path)
        assert codes <= {0, -signal.SIGKILL}, (tmp_path / "0.log").read_text()
        killed += -signal.SIGKILL in codes
        kept += len(Progress(out).done())
        assert not out.exists() or files_of(out) == files_of(made / "out")
    assert kept > kills  # the kills came in the middle


def stop_after(monkeypatch, finished: int, error: BaseException) -> None:
    """Raises an error when so many shards are finished."""
    finish = Progress.finish

    def counting(self, number, part):
        finish(self, number, part)
        if len(self.done()) >= finished:
            raise error

    monkeypatch.setattr(Progress, "finish", counting)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left"), RuntimeError("a bug")])
def test_finished_shards_are_kept_and_not_encoded_again(made, tmp_path, monkeypatch, capfd, encoded, error):
    with monkeypatch.context() as patch:
        stop_after(patch, 9, error)
        with pytest.raises(ValueError if isinstance(error, OSError) else type(error)):
            run(made, tmp_path / "out", **SMALL)
    assert f"9 of 15 shards are kept in {tmp_path}/out.partial; the same command continues" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "out.writing"]
    encoded.clear()
    run(made, tmp_path / "out", **SMALL)
    assert "9 of 15 shards are finished and kept" in capfd.readouterr().err
    assert sum(encoded) in (35, 36)  # of six shards, one of which may have the unreadable image
    assert files_of(tmp_path / "out") == files_of(made / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("how", ["flipped bit", "cut", "gone", "part cut", "part gone", "stranger"])
def test_what_is_damaged_meanwhile_is_written_again(made, tmp_path, monkeypatch, encoded, how):
    with monkeypatch.context() as patch:
        stop_after(patch, 9, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(made, tmp_path / "out", **SMALL)
    shard, part = tmp_path / "out.partial" / "shard-00004.tar", tmp_path / "out.writing" / "shard-00004.part"
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    {
        "flipped bit": lambda: shard.write_bytes(data),
        "cut": lambda: os.truncate(shard, 5000),
        "gone": shard.unlink,
        "part cut": lambda: os.truncate(part, 50),
        "part gone": part.unlink,
        "stranger": lambda: shard.with_name("shard-00014.1234abcd").write_bytes(b"of a run that was killed"),
    }[how]()
    encoded.clear()
    run(made, tmp_path / "out", **SMALL)
    assert sum(encoded) in ((35, 36) if how == "stranger" else (41, 42))
    assert files_of(tmp_path / "out") == files_of(made / "out")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "float32"}, "dtype (float16, now float32)"),
        ({"image_size": 16}, "image_size ([32, 32], now [16, 16])"),
        ({"shard_size": 7, "batch_size": 5}, "batch_size (4, now 5), shard_size (6, now 7)"),
        ("vae", "the weights of the autoencoder"),
        ("added image", "the images"),
        ("edited image", "the images"),
    ],
)
def test_other_settings_start_again_and_say_so(made, tmp_path, monkeypatch, capfd, encoded, change, said):
    for name in ("images", "vae"):
        (tmp_path / name).symlink_to(made / name)
    with monkeypatch.context() as patch:
        stop_after(patch, 9, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, tmp_path / "out", **SMALL)
    options = SMALL | (change if isinstance(change, dict) else {})
    if change == "vae":
        (tmp_path / "vae").unlink()
        tiny_vae(seed=1).save_pretrained(tmp_path / "vae")
    elif isinstance(change, str):
        (tmp_path / "images").unlink()
        write_digits(tmp_path / "images", COUNT)
        path = next((tmp_path / "images" / "3").iterdir())
        if change == "added image":
            path = path.with_name("new.png")
        Image.fromarray(np.zeros((40, 36, 3), np.uint8)).save(path)
    encoded.clear()
    capfd.readouterr()
    manifest = run(tmp_path, tmp_path / "out", **options)
    assert f"out used other settings and starts again; changed: {said}\n" in capfd.readouterr().err
    assert sum(encoded) == len(manifest) >= COUNT - 1
    run(tmp_path, tmp_path / "fresh", **options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_other_processes_continue_what_one_began(made, tmp_path, monkeypatch, encoded):
    with monkeypatch.context() as patch:
        stop_after(patch, 9, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(made, tmp_path / "out", **SMALL)
    encoded.clear()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda r: run(made, tmp_path / "out", ranks=r, **SMALL), thread_ranks(3, made, monkeypatch)))
    assert sum(encoded) in (35, 36)
    assert files_of(tmp_path / "out") == files_of(made / "out")


@pytest.mark.parametrize("moves", [0, 1, 2])  # old folder away, new one there
def test_stopped_while_it_is_published_it_continues(made, tmp_path, monkeypatch, encoded, moves):
    run(made, tmp_path / "out", **SMALL | {"dtype": "float32"})
    rename, done = Path.rename, []

    def stopping(self: Path, target: Path) -> None:
        if self.parent == tmp_path:
            if len(done) == moves:
                raise KeyboardInterrupt
            done.append(target)
        rename(self, target)

    encoded.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stopping)
        if moves < 2:
            with pytest.raises(KeyboardInterrupt):
                run(made, tmp_path / "out", overwrite=True, **SMALL)
            patch.undo()
        run(made, tmp_path / "out", overwrite=True, **SMALL)
    assert sum(encoded) == COUNT - 1  # once
    assert files_of(tmp_path / "out") == files_of(made / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failing_process_ends_the_others(made, tmp_path, monkeypatch):
    complete = writer.ShardWriter.close

    def failing(self, *arguments):
        if self.number == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return complete(self, *arguments)

    monkeypatch.setattr(writer.ShardWriter, "close", failing)
    ranks = thread_ranks(2, made, monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(run, made, tmp_path / "out", ranks=r, **SMALL) for r in ranks]
    assert "no space left for out=" in str(futures[1].exception())
    assert "another process of this extraction has failed" in str(futures[0].exception())
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(writer.ShardWriter, "close", complete)
    run(made, tmp_path / "out", **SMALL)
    assert files_of(tmp_path / "out") == files_of(made / "out") and Manifest.load(tmp_path / "out").skipped == 1
