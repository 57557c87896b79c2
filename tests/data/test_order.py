"""Orders of very large sets, which are never listed, and of blocks of images."""

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastdit.data.loader import latent_batches, sample_keys, split
from fastdit.data.manifest import Manifest, Shard
from fastdit.data.opening import open_latents
from fastdit.data.order import LISTED, WINDOW, Listed, Order, hash_of, permutation, scattered
from fastdit.schema import ShardSet
from helpers.sets import write_all
from helpers.shards import take

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    return write_all(tmp_path_factory.mktemp("sets"))


@pytest.mark.parametrize("n", [1, 2, 3, 255, 257, 16_385, 60_000])
def test_a_list_is_sorted_by_a_hash_in_whatever_order_it_is_read(n):
    draw, sorted_ = np.random.default_rng(n), np.argsort(hash_of(5, 1, 0, np.arange(n, dtype=np.uint64)))
    parts = min(n, 40)
    for way in [np.arange(n)], np.array_split(np.arange(n), parts)[::-1], np.array_split(draw.permutation(n), parts):
        order = Listed(n, 5, 1, 0)
        for places in way:
            np.testing.assert_array_equal(order[places], sorted_[places])
    order = Listed(n, 5, 1, 0)
    np.testing.assert_array_equal(order[np.arange(min(n, 8))], sorted_[:8])
    assert n < 1000 or order.sorted.sum() == 1  # the others are sorted when they are read


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 63, 65, 1000, 4097, 65_537])
def test_a_scattered_order_has_each_image_once(n):
    for epoch in range(3):
        images = scattered(np.arange(n), n, 7, epoch)
        np.testing.assert_array_equal(np.sort(images), np.arange(n))
        np.testing.assert_array_equal([scattered(np.array([p]), n, 7, epoch)[0] for p in range(0, n, n // 7 + 1)],
                                      images[:: n // 7 + 1])  # fmt: skip


def test_a_scattered_order_is_uniform():
    n, seeds, cells = 10**9, 1000, 10
    images = np.array([scattered(np.array([0, 1, n - 1]), n, seed, 0) for seed in range(seeds)])  # (seeds, 3)
    for values in (*images.T, (images[:, 1] - images[:, 0]) % n):  # neighbors are independent
        counts = np.bincount(values * cells // n, minlength=cells)
        chi_square = (np.square(counts - seeds / cells) / (seeds / cells)).sum()
        assert chi_square < 34  # of 9 degrees of freedom, exceeded with probability 1e-4
    own = scattered(np.arange(10**5), LISTED + 1, 3, 5)
    assert len(np.unique(own)) == 10**5 and own.max() <= LISTED and (np.diff(own) == 1).sum() < 5


def test_sets_up_to_the_limit_keep_their_order_and_larger_ones_are_never_listed():
    images, _ = Order(3, [1000])(np.arange(3000))
    np.testing.assert_array_equal(images, np.concatenate([permutation(3, epoch, 1000) for epoch in range(3)]))
    tracemalloc.start()
    try:
        for block in (0, 64, 4096):
            order = Order(3, [10**9, 2 * 10**9], [1, 2], block=block)
            images, epochs = order(300 * 10**9 + np.arange(512))
            assert len({*images.tolist()}) == 512 and set(epochs.tolist()) <= {99, 100}
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 << 20  # the list of one epoch would be 8 GB


def test_the_order_of_large_sets_never_changes_between_versions():
    places = 10**9 * 100 + np.arange(4)
    assert Order(0, [10**9])(places)[0].tolist() == [588597965, 197613394, 615275297, 605177112]
    assert Order(0, [53], block=3)(np.arange(8))[0].tolist() == [24, 9, 1, 44, 7, 45, 23, 11]


@pytest.mark.parametrize("n", [1, 5, 16, 24, 25, 100, 803])
@pytest.mark.parametrize("block", [1, 3, 8, 50, 1000])
def test_an_epoch_in_blocks_has_each_image_once_and_reads_each_block_within_a_window(n, block):
    order = Order(9, [n], block=block)
    images, epochs = order(np.arange(4 * n))
    np.testing.assert_array_equal(epochs, np.arange(4 * n) // n)
    for epoch, own in enumerate(images.reshape(4, n)):
        np.testing.assert_array_equal(np.sort(own), np.arange(n))
        for window in range(0, n, WINDOW * block):
            stored = np.sort(own[window : window + WINDOW * block])
            runs = 1 + (np.diff(stored) != 1).sum()
            assert runs <= WINDOW + 2  # the window's blocks, one that goes on at image 0, and what is left of n
        np.testing.assert_array_equal(Order(9, [n], block=block)(epoch * n + np.arange(n)[::-1])[0], own[::-1])
    if n > 100:
        assert len({tuple(own) for own in images.reshape(4, n)}) == 4


def test_blocks_are_read_ahead_and_each_image_comes_equally_early(monkeypatch, sets):
    starts = np.array([np.argsort(Order(1, [100], block=7)(epoch * 100 + np.arange(100))[0]) for epoch in range(400)])
    # the place of an image in an epoch is uniform on 0..99: mean 49.5, deviation 28.9 / sqrt(400) = 1.44
    assert np.abs(starts.mean(axis=0) - 49.5).max() < 5 * 1.44
    asked = []
    monkeypatch.setattr("os.posix_fadvise", lambda file, *stretch: asked.append((file, *stretch)))
    manifest = replace(Manifest.load(sets / "b"), block=5)
    take(manifest, 5, global_batch=8, seed=0, prefetch=0)
    assert len(asked) == len(set(asked)) and all(place % size == 0 for _, place, size, _ in asked)
    size, index = asked[0][2], manifest.index()
    assert len(asked) == len({(int(row["shard"]), int(row["offset"]) // size) for row in index})


def test_blocks_with_a_mixture_and_held_out_images(sets):
    mixed = open_latents((ShardSet(str(sets / "a"), 1.0), ShardSet(str(sets / "b"), 3.0)))
    for manifest in (Manifest.load(sets / "b"), mixed):
        train, rest = split(replace(manifest, block=4), 0.2)
        assert train.block == 4
        keys = {key for step in range(60) for key in sample_keys(train, 1, 4, step)}
        assert keys == {*train.index()["key"].tolist()} and not keys & {*rest.index()["key"].tolist()}
        assert sample_keys(train, 1, 4, 3) != sample_keys(replace(train, block=0), 1, 4, 3)


def test_the_index_of_a_large_set_is_mapped(monkeypatch, sets):
    whole = Manifest.load(sets / "b").index()
    monkeypatch.setattr("fastdit.data.manifest.LISTED", 10)
    monkeypatch.setattr("fastdit.data.manifest.ROWS", 7)
    manifest = Manifest.load(sets / "b")
    assert isinstance(manifest.index(), np.memmap)
    np.testing.assert_array_equal(manifest.index(), whole)
    wrong = replace(manifest, shards=tuple(replace(shard, bytes=600) for shard in manifest.shards))
    with pytest.raises(ValueError, match="has samples outside the shards"):
        wrong.index()
    with pytest.raises(ValueError, match="does not match the manifest"):
        replace(manifest, index_sha256="0" * 64).index()


def test_the_loader_of_many_images_lists_none(monkeypatch, sets):
    manifest = Manifest.load(sets / "b")
    rows, n = manifest.index(), 2 * 10**8
    many = np.lib.stride_tricks.as_strided(rows[:1], (n,), (0,))  # one image many times
    shards = (Shard("shard-00000.tar", n, 1 << 49, ""),)
    huge = replace(manifest, shards=shards, images=n)
    monkeypatch.setattr(type(huge), "index", lambda self: many)
    monkeypatch.setattr(type(huge), "check_files", lambda *_: None)
    tracemalloc.start()
    try:
        batches = latent_batches(huge, global_batch=8, seed=0, start_step=100 * n // 8)
        batch = next(batches)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    batches.close()
    assert batch.step == 100 * n // 8 and peak < 10 << 20  # the list of one epoch would be 1.6 GB
