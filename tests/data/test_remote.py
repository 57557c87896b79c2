"""Remote folders of latents: fetched once into the cache, checked, and read as local ones are."""

import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

from fastdit.data import remote
from fastdit.data.loader import sample_keys
from fastdit.data.manifest import Manifest
from fastdit.data.opening import open_latents
from fastdit.data.remote import Cache
from fastdit.schema import ShardSet
from helpers.data import edit_manifest
from helpers.sets import write_all
from helpers.shards import take

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    return write_all(tmp_path_factory.mktemp("sets"))


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(remote, "WAITS_S", (0, 0))


@pytest.fixture
def memory(sets):
    system = fsspec.filesystem("memory")
    for name in "ab":
        system.put(str(sets / name), f"/bucket/{name}", recursive=True)
    yield system
    system.rm("/bucket", recursive=True)


def first_batches(manifest: Manifest) -> np.ndarray:
    return np.stack([batch.moments.numpy() for batch in take(manifest, 6, global_batch=7, seed=3)])


def content(manifest: Manifest, number: int) -> bytes:
    with open(manifest.open_shard(number), "rb") as file:
        return file.read()


def files(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return sorted(str(path.relative_to(folder)) for path in found)


def test_a_remote_folder_is_read_as_a_local_one_and_each_file_fetched_once(sets, memory, tmp_path, monkeypatch):
    fetched, copy = [], remote._copy
    monkeypatch.setattr(remote, "_copy", lambda url, name, *rest: fetched.append(name) or copy(url, name, *rest))
    local, there = Manifest.load(sets / "b"), Manifest.load("memory://bucket/b", Cache(tmp_path / "cache"))
    assert there == local and there.to_json() == local.to_json() and fetched == []
    np.testing.assert_array_equal(first_batches(there), first_batches(local))
    assert sorted(fetched) == ["index.npy", *(shard.name for shard in local.shards)]
    np.testing.assert_array_equal(first_batches(there), first_batches(local))
    for number in range(len(local.shards)):
        assert content(there, number) == content(local, number)
    assert len(fetched) == 1 + len(local.shards)
    hashes = [local.index_sha256, *(shard.sha256 for shard in local.shards)]
    assert [name for name in files(tmp_path / "cache") if "/" not in name] == sorted(hashes)
    assert len(files(tmp_path)) == len(hashes) + 1  # and the manifest


def test_a_shard_is_fetched_when_it_is_needed(memory, tmp_path):
    manifest = replace(Manifest.load("memory://bucket/b", Cache(tmp_path)), block=5)
    row = manifest.index()[25]
    assert len(content(manifest, int(row["shard"]))) == manifest.shards[row["shard"]].bytes
    assert len(files(tmp_path)) == 3  # manifest, index, one shard


def test_remote_folders_mix_with_local_ones(sets, memory, tmp_path):
    def mixed(a, b):
        return open_latents((ShardSet(str(a), 1.0), ShardSet(str(b), 2.0)), Cache(tmp_path / "cache"))

    local, there = mixed(sets / "a", sets / "b"), mixed(sets / "a", "memory://bucket/b")
    np.testing.assert_array_equal(first_batches(there), first_batches(local))
    assert sample_keys(there, 3, 7, 5) == sample_keys(local, 3, 7, 5)


def test_an_interrupted_download_starts_again(sets, memory, tmp_path, monkeypatch):
    manifest = Manifest.load("memory://bucket/b", Cache(tmp_path))
    monkeypatch.setattr(remote, "CHUNK", 100)
    read, calls = remote._read, []

    def fails(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise ValueError("connection reset")
        return read(*arguments)

    monkeypatch.setattr(remote, "_read", fails)
    with pytest.raises(ValueError, match="connection reset"):
        content(manifest, 0)
    assert [name for name in files(tmp_path) if "partial" in name] == [f"{manifest.shards[0].sha256}.partial"]
    assert content(manifest, 0) == (sets / "b" / manifest.shards[0].name).read_bytes()
    assert not [name for name in files(tmp_path) if "partial" in name]


def test_wrong_contents_are_refused_and_may_be_repaired(sets, tmp_path, monkeypatch):
    there = tmp_path / "there"
    shutil.copytree(sets / "b", there)
    shard = there / "shard-00001.tar"
    good = shard.read_bytes()
    manifest = Manifest.load(f"file://{there}", Cache(tmp_path / "cache"))
    for wrong in (good[:-1], good[:-1] + b"x", good + bytes(10 * remote.CHUNK), b""):
        shard.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"shard-00001.tar does not have the SHA-256 in the manifest; upload"):
            content(manifest, 1)
        assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.partial")) == 0
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-00001.tar cannot be read \(it is not there\); check data.shards"):
        content(manifest, 1)
    shard.write_bytes(good)
    assert content(manifest, 1) == good
    (there / "index.npy").write_bytes(b"no index")
    with pytest.raises(ValueError, match="index.npy does not have the SHA-256"):
        manifest.index()


def test_nothing_is_written_outside_the_cache(sets, tmp_path):
    there, cache = tmp_path / "there", tmp_path / "cache"
    shutil.copytree(sets / "b", there)
    text = (there / "manifest.json").read_text()
    digest = Manifest.load(sets / "b").shards[0].sha256
    edit_manifest(there, digest, "../outside")
    with pytest.raises(ValueError, match="names shard-00000.tar without a SHA-256"):
        content(Manifest.load(f"file://{there}", Cache(cache)), 0)
    (there / "manifest.json").write_text(text)
    edit_manifest(there, "shard-00000.tar", "../shard-00000.tar")
    with pytest.raises(ValueError, match="is not a file of this folder"):
        Manifest.load(f"file://{there}", Cache(cache))
    (there / "manifest.json").write_text(text)
    (cache / f"{digest}.partial").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match="symbolic link|loop"):
        content(Manifest.load(f"file://{there}", Cache(cache)), 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "there"]


def fetch(url: str, cache: Path) -> None:
    manifest = Manifest.load(url, Cache(cache))
    for number in range(len(manifest.shards)):
        content(manifest, number)


def test_processes_share_a_cache(sets, tmp_path):
    url = f"file://{sets / 'b'}"
    processes = [multiprocessing.get_context("fork").Process(target=fetch, args=(url, tmp_path)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    local = Manifest.load(sets / "b")
    assert [name for name in files(tmp_path) if "/" not in name] == sorted(shard.sha256 for shard in local.shards)
    np.testing.assert_array_equal(first_batches(Manifest.load(url, Cache(tmp_path))), first_batches(local))


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ("pipe:cat secret", "data.shards=pipe:cat secret cannot be read; use a local folder, or one of s3://"),
        ("ftp://host/x", "data.shards=ftp://host/x cannot be read"),
        ("simplecache::memory://bucket/b", "cannot be read; use a local folder"),
        ("memory://x::s3://bucket/b", "cannot be read; use a local folder"),
        ("memory://bucket/b?sig=1", "has a query, which the names of its files cannot follow; leave it out"),
        ("https://me:secret@host/b", r"data.shards=https://\*\*\*@host/b has a password, .*; leave it out and put it"),
        ("memory://bucket/none", "none/manifest.json cannot be read .*check data.shards"),
    ],
)
def test_other_places_are_refused(shards, message, memory, tmp_path):
    with pytest.raises(ValueError, match=message):
        Manifest.load(shards, Cache(tmp_path))


def test_a_cache_must_be_named(memory):
    with pytest.raises(ValueError, match="data.shards=memory://bucket/b needs a folder .*set data.cache=FOLDER"):
        Manifest.load("memory://bucket/b")


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ValueError, match="needs a package; pip install s3fs"):
        Manifest.load("s3://bucket/b", Cache(tmp_path))
