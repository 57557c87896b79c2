"""Several folders of latents in one run: shares, epochs, and global batches that depend on (seed, position) alone."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastdit.config import config_from
from fastdit.data.loader import latent_batches, read_moments, sample_keys, split
from fastdit.data.manifest import Manifest
from fastdit.data.mixture import APART
from fastdit.data.opening import open_features, open_latents
from fastdit.data.order import ROUND, Order, shares
from fastdit.report.facts import read_run
from fastdit.report.measure import Measured
from fastdit.report.page import about
from fastdit.schema import ShardSet
from fastdit.verify import verify
from helpers.runs import losses, train_here
from helpers.sets import SIZES, SPEC, write, write_all
from helpers.shards import take, write_shards

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    return write_all(tmp_path_factory.mktemp("sets"))


def mixed(root: Path, **weights: float) -> Manifest:
    return open_latents(tuple(ShardSet(str(root / name), weight) for name, weight in weights.items()))


def batches_of(manifest: Manifest, steps: range, **options) -> list[np.ndarray]:
    """The first value of each sample of each step, with its label."""
    found = take(manifest, len(steps), start_step=steps.start, **options)
    assert [batch.step for batch in found] == [*steps]
    return [np.stack([batch.moments[:, 0, 0, 0].numpy(), batch.y.numpy()], 1) for batch in found]


def test_100_random_worlds_prefetches_resume_points_and_mixes_give_the_same_global_batches(sets):
    draw, seen = random.Random(0), set()
    for _ in range(100):
        names = draw.sample([*SIZES], draw.randint(1, 4))
        weights = {name: draw.choice([0.1, 1, 1, 2.5, 7]) for name in names}
        manifest = mixed(sets, **weights) if len(names) > 1 else Manifest.load(sets / names[0])
        world, each = draw.randint(1, 4), draw.randint(1, 3)
        global_batch, seed, hflip = world * each, draw.randint(0, 99), draw.random() < 0.8
        if global_batch > len(manifest):
            global_batch, world = each, 1
        resumed = draw.choice([0, 1, 17, 3 * ROUND // global_batch - 1, 10**7])  # within, at and far behind a round
        steps = range(max(resumed - draw.randint(0, 2), 0), resumed + 3)
        same = {"global_batch": global_batch, "seed": seed, "hflip": hflip}
        whole = batches_of(manifest, steps, prefetch=draw.randint(0, 5), **same)
        parts = [
            batches_of(manifest, range(resumed, steps.stop), prefetch=draw.randint(0, 5),
                       rows=slice(rank * each, (rank + 1) * each), **same)
            for rank in range(world)
        ]  # fmt: skip
        for step, of_ranks in zip(range(resumed, steps.stop), zip(*parts, strict=True), strict=True):
            np.testing.assert_array_equal(np.concatenate(of_ranks), whole[step - steps.start])
        images, epochs = manifest.order(seed)(steps.start * global_batch + np.arange(global_batch))
        rows = manifest.index()[images]
        np.testing.assert_array_equal(rows["label"], whole[0][:, 1])
        np.testing.assert_array_equal(abs(whole[0][:, 0]), read_moments(manifest, rows)[:, 0, 0, 0])
        assert sample_keys(manifest, seed, global_batch, steps.start) == rows["key"].tolist()
        seen |= {(len(names), world)}
    assert len(seen) > 12  # of 16


def test_each_round_has_the_shares_of_the_weights_and_each_set_its_own_epochs():
    order = Order(3, [7, 40, 23], [0.7, 0.2, 0.1])
    images, epochs = order(np.arange(2 * ROUND))
    for number in range(2):
        parts = np.searchsorted([7, 47], images[number * ROUND : (number + 1) * ROUND], side="right")
        assert np.bincount(parts).tolist() == [7000, 2000, 1000]
    for first, size in ((0, 7), (7, 40), (47, 23)):
        own = (images >= first) & (images < first + size)
        whole = own.sum() // size * size
        np.testing.assert_array_equal(epochs[own], np.arange(own.sum()) // size)
        passes = images[own][:whole].reshape(-1, size)
        np.testing.assert_array_equal(np.sort(passes), np.broadcast_to(np.arange(first, first + size), passes.shape))
        assert len({tuple(p) for p in passes}) > len(passes) / 2  # in another order
    first = np.searchsorted([7, 47], images[:1000], side="right")  # neither in blocks nor periodic
    assert 650 < (first == 0).sum() < 750 and not np.array_equal(first[:100], first[100:200])
    backwards = [Order(3, [7, 40, 23], [0.7, 0.2, 0.1])(np.array([p]))[0][0] for p in (19_999, 12_345, 5, 0)]
    np.testing.assert_array_equal(backwards, images[[19_999, 12_345, 5, 0]])


def test_shares_are_the_nearest_whole_numbers():
    assert shares((1, 1, 1)).tolist() == [3334, 3333, 3333] and shares((2, 1)).tolist() == [6667, 3333]
    assert shares((3e-4, 1e-4)).tolist() == [7500, 2500]  # weights need not sum to 1
    with pytest.raises(ValueError, match="weight 4e-05 of 1 in all; use at least 1 / 10000"):
        shares((4e-5, 1 - 4e-5))


def test_the_manifest_of_a_mixture_describes_all_sets(sets):
    manifest = mixed(sets, a=3, b=1)
    a, b = Manifest.load(sets / "a"), Manifest.load(sets / "b")
    assert (len(manifest), manifest.class_counts) == (47, tuple(np.add(a.class_counts, b.class_counts)))
    mean = 0.75 * np.array(a.channel_mean) + 0.25 * np.array(b.channel_mean)
    second = sum(w * (np.square(m.channel_mean) + np.square(m.channel_std)) for w, m in ((0.75, a), (0.25, b)))
    np.testing.assert_allclose(manifest.channel_mean, mean)
    np.testing.assert_allclose(manifest.channel_std, np.sqrt(second - mean**2))
    assert manifest.normalized("channel").channel_std == (1.0,) and len(manifest.normalized("channel")) == 47
    assert manifest.index()["key"].tolist() == [*range(7), *(APART + np.arange(40))]
    assert manifest.index_sha256 not in (a.index_sha256, mixed(sets, a=1, b=1).index_sha256)
    (sets / "b/shard-00000.tar").rename(sets / "b/away")
    try:
        with pytest.raises(ValueError, match=r"b/shard-00000.tar is missing"):
            latent_batches(manifest, global_batch=4, seed=0)
    finally:
        (sets / "b/away").rename(sets / "b/shard-00000.tar")


def test_each_set_holds_out_the_images_that_it_holds_out_alone(sets):
    train, held_out = split(mixed(sets, b=1, c=5), 0.2)
    alone = [split(Manifest.load(sets / name), 0.2)[1].index()["key"] for name in "bc"]
    assert held_out.index()["key"].tolist() == [*alone[0], *(APART + alone[1])]
    assert len(train) + len(held_out) == 63 and not {*train.index()["key"]} & {*held_out.index()["key"]}
    first = batches_of(train, range(40), global_batch=5, seed=1)
    out = {v for name, keys in zip("bc", alone, strict=True) for v in (1000 * (1 + [*SIZES].index(name)) + keys)}
    assert not {abs(v) for batch in first for v in batch[:, 0]} & out


def test_sets_that_do_not_belong_together_are_refused(sets, tmp_path):
    write(tmp_path / "wide", 5, spec=replace(SPEC, shape=(1, 2, 2)))
    write(tmp_path / "scale", 5, spec=replace(SPEC, scale=0.3))
    write(tmp_path / "size", 5, spec=replace(SPEC, image_size=4))
    write(tmp_path / "half", 5, dtype="float16")
    write(tmp_path / "names", 5, classes="xyw")
    write(tmp_path / "one", 5, orientations=1)
    for other, message in (
        ("wide", "have shape"), ("scale", "have scale 0.3"), ("size", "has image_size 2, .* 4; mix"),
        ("half", "has dtype float32, .*half float16; mix"), ("names", "has classes 3, such as z, .* 3, such as w"),
        ("missing", "has no manifest.json"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            open_latents((ShardSet(str(sets / "a"), 1.0), ShardSet(str(tmp_path / other), 1.0)))
    one = open_latents((ShardSet(str(sets / "a"), 1.0), ShardSet(str(tmp_path / "one"), 1.0)))
    with pytest.raises(ValueError, match=r"data.hflip=True, but .*set data.hflip=false"):
        latent_batches(one, global_batch=4, seed=0)
    assert min(v for batch in batches_of(one, range(9), global_batch=4, seed=0, hflip=False) for v in batch[:, 0]) >= 0
    with pytest.raises(ValueError, match=r"names .*a twice; add its weights"):
        open_latents((ShardSet(str(sets / "a"), 1.0), ShardSet(str(sets / "a"), 2.0)))
    with pytest.raises(ValueError, match="cannot be mixed with others"):
        open_latents((ShardSet("synthetic:8/1x1x2/3", 1.0), ShardSet(str(sets / "a"), 2.0)))
    with pytest.raises(ValueError, match="data.features=f is one folder, but data.shards names 2; .* as a/features"):
        open_features((ShardSet("a", 1.0), ShardSet("b", 2.0)), "f")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[{path: a, weight: 0}]", "the weight of a=0.0 is out of range; use a positive number"),
        ("[{path: a, weight: much}]", "data.shards.weight='much' must be a number"),
        ("[{path: a}]", "the weight of a=0.0 is out of range"),
        ("[{weight: 1}]", "data.shards.path='' is out of range; use a folder of latents"),
        ("[a, b]", "must be a section with keys path, weight"),
        ("[{folder: a, weight: 1}]", "data.shards.folder='a' is not a known key"),
    ],
)
def test_a_wrong_list_is_answered_in_one_line(value, message):
    with pytest.raises(ValueError, match=message):
        config_from({}, "config.yaml", [f"data.shards={value}"])


def test_a_run_trains_on_a_mixture_and_continues_bit_for_bit(world, tmp_path):
    first = Manifest.load(world / "latents")
    spec = first.latents
    random_latents = np.random.default_rng(0).normal(0, 1, (30, 2, 2 * spec.shape[0], *spec.shape[1:]))
    more = replace(first, shards=(), images=30)
    write_shards(((abs(m), 3) for m in random_latents), tmp_path / "more", more)
    sets = f"data.shards=[{{path: {world / 'latents'}, weight: 3}}, {{path: {tmp_path / 'more'}, weight: 1}}]"
    settings = [sets, "training.steps=6", "training.checkpoint_every=3", "data.val_fraction=0.1",
                "training.validate_images=20", "data.block=16"]  # fmt: skip
    train_here(world, tmp_path / "whole", *settings)
    train_here(world, tmp_path / "run", *settings, "training.steps=3")
    with pytest.raises(ValueError, match="has data.block=16, this run 0; make them equal to resume"):
        train_here(world, tmp_path / "run", *settings, "data.block=0", resume=True)
    train_here(world, tmp_path / "run", *settings, resume=True)
    assert losses(tmp_path / "run")[-3:] == losses(tmp_path / "whole")[-3:]
    assert verify(tmp_path / "run", say=lambda line: None) == []
    run = read_run(tmp_path / "run")
    assert len(run.manifest) > 1000 and not run.notes
    assert f"3 x {world / 'latents'} + 1 x {tmp_path / 'more'}" in about(run, Measured())["data"]
