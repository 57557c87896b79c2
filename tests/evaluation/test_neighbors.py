"""Nearest training images and memorization: against brute force, planted copies, and chance."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fastdit.cli import main
from fastdit.data.images import to_pixels
from fastdit.data.latents import LatentCodec
from fastdit.data.loader import read_moments
from fastdit.data.manifest import Manifest
from fastdit.distributed import Ranks
from fastdit.evaluation.memorization import neighbors
from fastdit.evaluation.neighbors import memorized, nearest
from helpers.commands import mistake
from helpers.evaluation import pictures, use_tiny, write_pngs
from helpers.runs import Forks
from helpers.shards import write_shards

pytestmark = pytest.mark.usefixtures("one_thread")
ALONE = Ranks(0, 0, 1, torch.device("cpu"))


def brute_force(queries, reference, k, own):
    """Every distance from its definition, sorted, with the lower index first among equals."""
    differences = queries.double()[:, :, None] - reference.double()  # (N, V, M, D)
    distances = differences.square().sum(-1).amin(1).sqrt()
    for i, j in enumerate(own.tolist()):
        distances[i, j if j >= 0 else []] = torch.inf
    order = distances.sort(dim=1, stable=True)
    return order.values[:, :k], order.indices[:, :k]


@pytest.mark.parametrize("count, views, size, dim, k", [(13, 1, 70, 5, 3), (9, 2, 41, 7, 5), (50, 1, 30, 3, 1)])
@pytest.mark.parametrize("block", [1, 4, 17, 1000])
def test_neighbors_are_exact_in_any_blocks_also_among_many_copies(count, views, size, dim, k, block):
    generator = torch.Generator().manual_seed(0)
    queries, reference = (100 + torch.randn(*shape, dim, generator=generator) for shape in ((count, views), (size,)))
    reference[size // 2 : size // 2 + 14] = reference[0]  # more than the spare candidates
    queries[0, 0], queries[1, -1] = reference[-1], reference[0]
    own = torch.randint(-1, size, (count,), generator=generator)
    own[:2] = torch.tensor([-1, 0])
    distances, indices = nearest(queries, reference.split(block), k, own)
    wanted, places = brute_force(queries, reference, k, own)
    assert torch.equal(distances, wanted) and torch.equal(indices, places)
    assert distances[0, 0] == distances[1, 0] == 0 and indices[1, 0] == size // 2  # its own row does not count


def test_a_reference_smaller_than_k_leaves_places_open():
    distances, indices = nearest(torch.zeros(1, 1, 2), [torch.ones(1, 2), torch.zeros(1, 2)], 4)
    assert distances.tolist() == [[0, 2**0.5, torch.inf, torch.inf]] and indices.tolist() == [[1, 0, -1, -1]]


def test_memorization_counts_planted_copies_exactly_and_is_chance_without():
    random = np.random.default_rng(0)
    share, error, chance = memorized(np.r_[np.zeros(20), np.full(80, 5.0)], random.uniform(1, 2, 300))
    assert share == 0.2 and chance == 3 / 301 and abs(error - (0.2 * 0.8 / 100) ** 0.5) < 0.002
    assert memorized(np.full(10, 1.0), np.full(10, 1.0))[0] == 0  # equally near is not nearer
    found = [memorized(random.random(200), random.random(150), resamples=2)[0] for _ in range(2000)]
    assert abs(np.mean(found) - 1 / 151) < 4 * np.std(found) / 2000**0.5
    drawn = np.std([memorized(random.random(2000), random.random(2000), resamples=2)[0] for _ in range(300)])
    told = np.mean([memorized(random.random(2000), random.random(2000), resamples=100)[1] for _ in range(10)])
    assert 0.8 < told / drawn < 1.25


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """60 training images, 300 like them, and 25 samples: 20 of colored cells, then 5 copies; all are rectangles."""
    monkeypatch.chdir(tmp_path)
    train, held = (pictures(count, seed=seed)[:, :, :40] for count, seed in ((60, 1), (300, 2)))
    cells = 255 * np.random.default_rng(0).integers(0, 2, (20, 4, 4, 3), dtype=np.uint8)
    samples = np.concatenate([cells.repeat(12, 1).repeat(10, 2), train[[7, 30, 30, 0, 59]]])
    np.savez(tmp_path / "samples.npz", samples)
    np.savez(tmp_path / "held.npz", held)
    write_pngs(tmp_path / "train", train)
    return tmp_path


def test_planted_copies_are_found_and_named(folder, small, capsys):
    arguments = ["neighbors", "samples.npz", "--reference", "train", "-k", "3", "--rows", "6", "--device", "cpu"]
    main([*arguments, "--held-out", "held.npz", "--results", "results.jsonl"])
    assert "memorized                 0.2000 +- 0.0" in capsys.readouterr().out
    result = json.loads((folder / "results.jsonl").read_text())
    values = result["values"]
    assert values["memorized"] == 0.2 and values["memorized_chance"] == 3 / 301 and values["authenticity"] == 0.8
    first = [(found["sample"], found["distances"][0], found["training_images"][0]) for found in result["nearest"][:5]]
    assert first == [(20, 0, "007.png"), (21, 0, "030.png"), (22, 0, "030.png"), (23, 0, "000.png"), (24, 0, "059.png")]
    assert result["nearest"][5]["distances"][0] > 0 and len(result["nearest"][0]["distances"]) == 3
    protocol = result["protocol"]
    assert protocol["held_out"]["images"] == 300 and protocol["metrics"]["memorized"]["quantile"] == 0.01
    main(["evaluate", "--compare", "results.jsonl", "results.jsonl"])
    assert "memorized" in capsys.readouterr().out
    main([*arguments, "--results", "results.jsonl"])  # its sheet does not replace the first one
    assert capsys.readouterr().out.endswith("neighbors-2.png\n") and (folder / "neighbors-2.png").exists()
    two = [*arguments, "--results", "results.jsonl", "--out", "new/sheet.png"]
    with Forks("fastdit/cli.py", *two, processes=2, before=use_tiny) as forks:
        assert set(forks.wait()) == {0}, forks.said()
    assert (folder / "new" / "sheet.png").read_bytes() == (folder / "neighbors-2.png").read_bytes()
    _, again, of_two = (json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines())
    assert {**of_two, "environment": 0} == {**again, "environment": 0}
    assert again["protocol"]["held_out"] == "60 training images, each against the others"
    assert again["values"]["memorized"] == 0.2 and again["nearest"] == result["nearest"]
    (folder / "first.jsonl").write_text(json.dumps(result))
    assert "held_out" in mistake(capsys, "evaluate", "--compare", "first.jsonl", "results.jsonl")


def test_the_sheet_shows_each_sample_beside_its_neighbors(folder, small):
    result, sheet = neighbors("samples.npz", "train", ALONE, k=2, rows=7)
    page, samples = np.asarray(sheet), np.load("samples.npz")["arr_0"]
    opened = lambda name: np.asarray(Image.open(f"train/{name}"))  # noqa: E731
    before = -1
    for found in result["nearest"]:
        images = [samples[found["sample"]], *(opened(name) for name in found["training_images"])]
        places = [[(y, x) for y, x in np.argwhere((page[:-47, :-39] == image[0, 0]).all(-1))
                   if (page[y : y + 48, x : x + 40] == image).all()] for image in images]  # fmt: skip
        row = min(y for y in set.intersection(*({y for y, _ in place} for place in places)) if y > before)
        columns = [[x for y, x in place if y == row] for place in places]
        assert columns[0][0] < columns[1][-1] < columns[2][-1]
        before = row


def test_the_order_of_the_samples_changes_no_digit(folder, small):
    samples = np.load("samples.npz")["arr_0"]
    np.savez("mixed.npz", samples[::-1])
    whole, _ = neighbors("samples.npz", "train", ALONE, rows=25)
    mixed, _ = neighbors("mixed.npz", "train", ALONE, rows=25)
    assert whole["values"] == mixed["values"]
    distances = [{(24 - f["sample"] if r is mixed else f["sample"]): f["distances"] for f in r["nearest"]}
                 for r in (whole, mixed)]  # fmt: skip
    assert distances[0] == distances[1]


def test_latents_are_compared_as_they_are_stored_also_mirrored(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = sorted((world / "images").rglob("*.png"))
    train = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in files[:40:4]])
    held = [np.asarray(Image.open(path).convert("RGB")) for path in sorted((world / "held_out").rglob("*.png"))[:110]]
    copies = np.concatenate([train[:5], train[5:, :, ::-1]])
    np.savez("samples.npz", np.concatenate([copies, 255 - np.stack(held[:30])]))
    np.savez("held.npz", np.stack(held))
    result, sheet = neighbors("samples.npz", world / "latents", ALONE, held_out="held.npz", rows=10, k=2)
    assert [found["distances"][0] for found in result["nearest"]] == [0] * 10
    assert [int(found["training_images"][0]) for found in result["nearest"]] == list(range(0, 40, 4))
    assert result["values"]["memorized"] == 10 / 40 and result["protocol"]["features"] == "latents"
    main(["extract", "--images", str(world / "held_out"), "--out", "held_latents", "--vae", str(world / "vae"),
          "--image-size", "32", "--device", "cpu"])  # fmt: skip
    other, _ = neighbors("samples.npz", world / "latents", ALONE, held_out="held_latents", rows=10, k=2)
    assert other["nearest"] == result["nearest"] and other["protocol"]["held_out"]["images"] == 599


def test_without_latents_of_mirror_images_no_view_is_mirrored(world, tmp_path, monkeypatch):
    """Samples, training images and held-out images have the same views, so that samples are not nearer by chance."""
    monkeypatch.chdir(tmp_path)
    both = Manifest.load(world / "latents")
    moments = read_moments(both, index := both.index()).numpy()
    write_shards(((row[None], int(y)) for row, y in zip(moments, index["label"], strict=True)), "one",
                 replace(both, orientations=1))  # fmt: skip
    files = sorted((world / "images").rglob("*.png"))[:20]
    samples = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in files])[:, :, ::-1].copy()
    np.savez("samples.npz", samples)
    codec = LatentCodec.load(world / "vae")
    stored, own = (values.astype(np.float64)[:, : codec.channels] * codec.scale for values in (
        moments, codec.encode(to_pixels(torch.from_numpy(samples))).half().numpy()))  # fmt: skip
    expected = [np.sqrt(((stored - one) ** 2).mean((1, 2, 3))).min() for one in own]
    result, _ = neighbors("samples.npz", "one", ALONE, k=1, rows=20)
    found = {row["sample"]: row["distances"][0] for row in result["nearest"]}
    np.testing.assert_allclose([found[i] for i in range(20)], expected, rtol=1e-3)
    assert min(expected) > 0  # the images of `one` themselves are at 0
    with pytest.raises(ValueError, match="--held-out=one has no latents of mirror images, but --reference has"):
        neighbors("samples.npz", world / "latents", ALONE, held_out="one")


@pytest.mark.parametrize(
    "line, words",
    [
        ("samples.npz", "give the training images with --reference"),
        ("--reference train", "name one folder or .npz file of samples"),
        ("nowhere --reference train", "SAMPLES=nowhere does not exist"),
        ("samples.npz --reference nowhere", "--reference=nowhere does not exist"),
        ("samples.npz --reference train --held-out nowhere", "--held-out=nowhere does not exist"),
        ("samples.npz --reference square.npz", "--reference=square.npz has images of 32x32 pixels, SAMPLES of 40x48"),
        ("samples.npz --reference one", "--reference=one has one image; give two or more"),
        ("samples.npz --reference train --features latents", "--reference=train is not a folder of latents"),
        ("samples.npz --reference train --features efficientnet", "did you mean 'efficientnet-lite0'"),
        ("samples.npz --reference train --features latent", "--features='latent' is unknown; did you mean 'latents'?"),
        ("samples.npz --reference train --image-size 32", "--image-size=32 center-crops folders and archives"),
        ("samples.npz --reference train --vae vae", "--vae=vae is for --features latents; leave it out"),
        ("samples.npz --reference train -k 0", "-k 0 and --rows=8 must be 1 or more"),
        ("samples.npz --reference train --out a.jpg", "--out=a.jpg must be a file that ends in .png"),
        ("samples.npz --reference train --results a.txt", "--results=a.txt must be a file that ends in .jsonl"),
    ],
)
def test_a_mistake_is_answered_in_one_line(folder, small, capsys, line, words):
    np.savez("square.npz", np.zeros((3, 32, 32, 3), np.uint8))
    write_pngs(folder / "one", pictures(1))
    assert words in mistake(capsys, "neighbors", *line.split(), "--device", "cpu")
    assert not (folder / "neighbors.png").exists()
