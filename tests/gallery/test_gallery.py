"""Pictures of samples: each image is the one that `fastdit sample` makes, and stands where its labels say."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastdit
from fastdit.cli import main
from fastdit.distributed import Ranks
from fastdit.gallery import pages
from fastdit.gallery.axes import folders_of, names_of, parts, read_axes
from fastdit.gallery.cells import Cell, batch_of, mix_classes, path_of
from fastdit.sampling import load_pipeline
from helpers.data import tiny_vae, write_digits
from helpers.runs import run, train_here

pytestmark = pytest.mark.usefixtures("one_thread")
ALONE = Ranks(0, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def model(trained):
    return fastdit.load(trained, device="cpu", steps=3)


@pytest.fixture(scope="module")
def wide(world, tmp_path_factory):
    """A run without classes on images of 64 x 32 pixels, sampled with ddpm in batches of 4."""
    base = tmp_path_factory.mktemp("wide")
    write_digits(base / "classes", 24)
    (base / "flat").mkdir()
    for path in (base / "classes").rglob("*.png"):
        path.rename(base / "flat" / path.name)
    tiny_vae().save_pretrained(base / "vae")
    main(["extract", "--images", f"{base}/flat", "--out", f"{base}/latents", "--vae", f"{base}/vae",
          "--image-size", "64x32", "--device", "cpu"])  # fmt: skip
    train_here(world, base / "run", f"data.shards={base}/latents", f"data.vae={base}/vae", "data.image_size=[64,32]",
               "data.num_classes=0", "training.steps=6", "objective=ddpm", "sampling.sampler=ddpm", "sampling.steps=3",
               "sampling.cfg_scale=1", "training.ema_decay=0.5")  # fmt: skip
    return base / "run"


@pytest.fixture
def drawn(monkeypatch):
    """What is passed to `labelled`, page by page: images and labels."""
    calls, labelled = [], pages.labelled

    def recorded(rows, **said):
        calls.append((np.stack([np.stack(row) for row in rows if len(row) == len(rows[0])]), said))
        return labelled(rows, **said)

    monkeypatch.setattr(pages, "labelled", recorded)
    return calls


def picture(*argv) -> None:
    main(["sample", *map(str, argv), "--device", "cpu"])


def one(model, label, seed, **settings) -> np.ndarray:
    return np.asarray(model.sample(classes=label, n=1, seed=seed, **settings)[0])


def test_a_sheet_has_the_pixels_of_sample_in_rows_columns_and_pages(trained, model, drawn, tmp_path):
    arguments = ["--classes", "7,3", "--seeds", "5,0-1", "--cfg_scale", "1,2.5", "sampling.steps=3"]
    picture(trained, *arguments, "--out", tmp_path / "sheet.png")
    assert [said["title"].split("\n")[-1] for _, said in drawn] == ["guidance 1", "guidance 2.5"]
    for (images, said), scale in zip(drawn, (1, 2.5), strict=True):
        assert said["row_labels"] == ["class 7", "class 3"]
        assert said["columns_title"] == "seed" and said["column_labels"] == ["5", "0", "1"]
        for (r, label), (c, seed) in product(enumerate((7, 3)), enumerate((5, 0, 1))):
            assert np.array_equal(images[r, c], one(model, label, seed, cfg_scale=scale))
    assert drawn[0][1]["title"].startswith("EMA, step 20, heun, 3 steps\n")
    with Image.open(tmp_path / "sheet.png") as page:
        assert page.mode == "RGB" and np.asarray(page).std() > 20


def test_the_images_are_those_of_the_folder_of_sample(trained, drawn, tmp_path):
    picture(trained, "--out", tmp_path / "out", "--num-samples", 1, "--labels", 4, "--seed", 9, "--steps", 2)
    picture(trained, "--out", tmp_path / "sheet.png", "--classes", 4, "--seeds", "8-9", "--steps", 2)
    assert np.array_equal(drawn[0][0][0, 1], np.asarray(Image.open(tmp_path / "out/images/000000.png")))


def test_rows_and_columns_can_be_any_two_axes(trained, model, drawn):
    texts = {"classes": "2", "seeds": "0", "steps": "2,3", "samplers": "euler,heun", "checkpoints": "step-15,20"}
    axes = read_axes(trained, **texts)
    pages.sheet(axes, ALONE, rows="checkpoint", columns="steps")
    assert [said["title"].split("\n")[-1] for _, said in drawn] == ["euler", "heun"]
    earlier = fastdit.load(trained / "checkpoints" / "step-0000015", device="cpu")
    for (images, said), sampler in zip(drawn, ("euler", "heun"), strict=True):
        assert said["row_labels"] == ["step 15", "step 20"] and said["column_labels"] == ["2", "3"]
        for (r, source), (c, steps) in product(enumerate((earlier, model)), enumerate((2, 3))):
            assert np.array_equal(images[r, c], one(source, 2, 0, steps=steps, sampler=sampler))


def test_options_of_a_sampler_are_those_of_the_samplers_that_are_named(trained, model, drawn, tmp_path):
    plain, noisy = (one(model, 2, 0, sampler={"name": "ddim", "eta": eta}) for eta in (0, 1))
    assert not np.array_equal(plain, noisy)
    few = ["--samplers", "ddim", "sampling.sampler.eta=1"]
    pages.sheet(read_axes(trained, classes="2", seeds="0,1", samplers="ddim", steps="3", overrides=few[2:]), ALONE)
    picture(trained, "--out", tmp_path / "out", "--num-samples", 1, "--labels", 2, "--steps", 3, *few)
    assert np.array_equal(drawn[0][0][0, 0], noisy)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out/images/000000.png")), noisy)


def test_what_is_not_given_suits_what_is(trained, wide):
    def counts(path, **texts):
        axes = read_axes(path, **texts)
        return [len(axes.values[axis]) for axis in ("class", "seed", "guidance", "steps")]

    assert counts(trained, cfg_scale="1,2,3") == [8, 1, 3, 1]
    assert counts(trained, seeds="0-2") == [8, 3, 1, 1]
    assert counts(trained, classes="1") == [1, 8, 1, 1]
    assert counts(trained, classes="1", steps="2,3") == [1, 8, 1, 2]
    assert counts(trained, classes="1,2", steps="2,3") == [2, 1, 1, 2]
    assert counts(wide, steps="2,3") == [1, 8, 1, 2]
    assert read_axes(trained, classes="1", seed=5).values["seed"] == [*range(5, 13)]


def test_a_single_axis_fills_rows_of_eight_with_captions(wide, drawn, capsys):
    picture(wide, "--seeds", "3-12")
    assert capsys.readouterr().out.strip() == str(wide / "sheet.png")
    for number in (2, 3):  # sheets of other settings do not take its place
        picture(wide, "--seeds", "0-1")
        assert capsys.readouterr().out.strip() == str(wide / f"sheet-{number}.png")
    with pytest.raises(SystemExit, match="2"):
        picture(wide, "--seeds", "0-1", "--out", str(wide / "sheet.png"))
    assert f"error: --out={wide}/sheet.png exists; choose another name" in capsys.readouterr().err
    model = fastdit.load(wide, device="cpu")
    images = [np.asarray(model.sample(n=1, seed=seed)[0]) for seed in range(3, 13)]
    with Image.open(wide / "sheet.png") as page:
        pixels = np.asarray(page)
    corners = []
    for image in images:  # rectangles, of a stochastic sampler
        assert image.shape == (32, 64, 3)
        [corner] = [(y, x) for y, x in np.argwhere((pixels[:-31, :-63] == image[0, 0]).all(-1))
                    if (pixels[y : y + 32, x : x + 64] == image).all()]  # fmt: skip
        corners.append(tuple(corner))
    assert corners == sorted(corners) and len({y for y, _ in corners}) == 2 and len({x for _, x in corners}) == 8


def test_any_number_of_processes_makes_the_same_sheet(trained, tmp_path):
    arguments = [trained, "--classes", "0,1", "--seeds", "0-2", "sampling.steps=2"]
    picture(*arguments, "--out", tmp_path / "one.png")
    run("fastdit/cli.py", "sample", *map(str, arguments), "--out", f"{tmp_path}/two.png", processes=2)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_interpolations_end_at_the_plain_samples(trained, wide, model, drawn):
    pages.interpolation(read_axes(trained, seeds="0,4,2", classes="1,6", steps="3"), ALONE, "seeds", 5)
    pages.interpolation(read_axes(trained, classes="1,6", seeds="3", steps="3"), ALONE, "classes", 4)
    pages.interpolation(read_axes(wide), ALONE, "seeds", 3)
    (seeds, said), (classes, also), (noise, _) = drawn
    assert said["row_labels"] == [f"class {c}, seed {a} to seed {b}" for c in (1, 6) for a, b in ((0, 4), (4, 2))]
    assert said["column_labels"] == ["0", "0.25", "0.5", "0.75", "1"] and also["row_labels"] == ["class 1 to class 6"]
    for r, (label, pair) in enumerate(product((1, 6), ((0, 4), (4, 2)))):
        assert np.array_equal(seeds[r, 0], one(model, label, pair[0]))
        assert np.array_equal(seeds[r, -1], one(model, label, pair[1]))
    for c, label in ((0, 1), (-1, 6)):
        assert np.array_equal(classes[0, c], one(model, label, 3))
    unconditional = fastdit.load(wide, device="cpu")  # ddpm draws noise at every step
    for r, seed in enumerate((0, 1)):
        assert np.array_equal(noise[r, 0], np.asarray(unconditional.sample(n=1, seed=seed)[0]))
        assert np.array_equal(noise[r, -1], np.asarray(unconditional.sample(n=1, seed=seed + 1)[0]))
        assert len({image.tobytes() for image in noise[r]}) == 3


def test_interpolated_noise_keeps_its_length_and_lies_between(trained):
    pipeline = load_pipeline(trained, ["sampling.batch_size=3"])
    noise, _ = batch_of(pipeline, [Cell(0, 1, 2, u) for u in (0.0, 0.5, 1.0)])
    for _ in range(2):
        a, middle, b = noise(torch.empty(3, 4, 64, 64)).double().flatten(1)
        torch.testing.assert_close(middle.norm(), (a.norm() + b.norm()) / 2, rtol=0.01, atol=0)
        torch.testing.assert_close(middle @ a / a.norm() ** 2, middle @ b / b.norm() ** 2, rtol=0.02, atol=0)
    assert abs(a @ b) < 0.1 * a.norm() * b.norm()


def test_a_mix_of_classes_is_the_mix_of_their_rows_also_for_a_weak_network(trained):
    pipeline = load_pipeline(trained, [f"sampling.weak_checkpoint={trained}"])
    before = pipeline.model.y_embedder.embedding_table.weight.clone()
    labels = mix_classes(pipeline, [(2, 7, 0.0), (2, 7, 0.25), (2, 7, 1.0)])
    assert labels == [11, 12, 13]
    for network in (pipeline.inference, pipeline.weak):
        table = network.model.y_embedder.embedding_table
        assert torch.equal(table.weight[:11], before)
        rows = table(torch.tensor(labels))
        torch.testing.assert_close(rows, torch.stack([before[2], 0.75 * before[2] + 0.25 * before[7], before[7]]))


def test_a_trajectory_goes_from_the_noise_to_the_sample(trained, model, drawn, tmp_path):
    picture(trained, "--trajectory", "png", "--classes", "3,5", "--steps", 3, "--out", tmp_path / "strip.png")
    [(images, said)] = drawn
    assert said["row_labels"] == ["class 3 x_t", "predicted x_0", "class 5 x_t", "predicted x_0"]
    assert said["column_labels"] == ["1.00", "0.67", "0.33", "0.00"] and images.shape == (4, 4, 32, 32, 3)
    for r, label in enumerate((3, 5)):
        assert np.array_equal(images[2 * r, -1], one(model, label, 0))
        assert np.array_equal(images[2 * r + 1, -1], images[2 * r, -1])
    pipeline = load_pipeline(trained, ["sampling.steps=3"])
    noise, labels = batch_of(pipeline, [Cell(3, 0), Cell(5, 0)])
    times, x_t, x_0 = pipeline.trajectory(noise, labels, 99)
    again, _ = batch_of(pipeline, [Cell(3, 0), Cell(5, 0)])
    assert torch.equal(x_t[0], again(x_t[0])) and times == pytest.approx([1, 2 / 3, 1 / 3, 0])
    t = torch.full((len(labels),), times[1], dtype=torch.float64)
    predicted = pipeline.objective.predict(pipeline.inference, x_t[1], t, labels).x_0
    assert (predicted - x_0[1]).abs().max() > 0  # the guidance of the run
    assert path_of(pipeline, [Cell(3, 0)], 2)[0] == [1, 0]


def test_a_gif_holds_its_last_frame(trained, model, tmp_path):
    out = tmp_path / "path.gif"
    picture(trained, "--trajectory", "gif", "--classes", "3", "--seeds", 0, "--steps", 3, "--out", out)
    with Image.open(out) as gif:
        assert gif.n_frames == 4
        durations = []
        for frame in range(4):
            gif.seek(frame)
            durations.append(gif.info["duration"])
        pixels = np.asarray(gif.convert("RGB")).astype(int)
    assert durations == [150, 150, 150, 2000]
    wanted = one(model, 3, 0).astype(int)
    height, width = np.array(pixels.shape[:2]) - 31
    errors = [np.abs(pixels[y : y + 32, x : x + 32] - wanted).mean() for y in range(height) for x in range(width)]
    assert sum(error < 10 for error in errors) == 2  # x_t and the predicted x_0, in 256 colors; elsewhere 28


MISTAKES = {
    "--classes 3,zebra": "'zebra' is not a class of this model; use classes by name or by number in 0..9",
    "--classes 3,3": "--classes=3,3 names something twice; give each value once",
    "--seeds 3-1": "--seeds=3-1: 3-1 must go up, and over fewer than 1024 seeds",
    "--seeds 0-9999999": "must go up, and over fewer than 1024 seeds",
    "--seeds 1.5": "--seeds=1.5: '1.5' is not a value; give whole numbers, such as 0-7 or 3,5",
    "--seeds 0-999 --cfg_scale 1,2": "a picture of 16,000 images is too large; choose at most 1,024",
    "--cfg_scale 1,two": "sampling.cfg_scale='two' must be a number",
    "--cfg_scale 1,2 sampling.cfg_scale=3": "--cfg_scale=1,2 and sampling.cfg_scale=3 are the same; give one",
    "--cfg_scale 2 sampling.cfg_scale=3": "--cfg_scale=2 and sampling.cfg_scale=3 are the same; give one",
    "--samplers ddim sampling.sampler.name=heun": "--samplers=ddim and sampling.sampler.name=heun are the same",
    "--steps 2 sampling={steps:3}": "--steps=2 and sampling={steps:3} are the same; give one",
    "--samplers ddim,heun sampling.sampler.eta=1": "sampling.sampler.eta=1 is an option of ddim, not of heun;",
    "--seeds 0-3 seed=3": "seed=3 changes nothing when sampling; use --seed 3",
    "--classes 1 training.lr=1": "training.lr=1: only sampling.*, objective, data.vae, model.attention and ",
    "--steps 1,,2": "--steps=1,,2: '' is not a value; give values with commas between",
    "--samplers heun,hein": "did you mean 'heun'?",
    "--checkpoints step-15,step-7": "has no step 7, only step-10, step-15, step-20; give one of them, or a path",
    "--checkpoints step-15,nowhere": "checkpoint nowhere does not exist",
    "--seeds 0-3 --num-samples 4": "--num-samples is for a folder of samples; a picture has one image for each of",
    "--seeds 0-1 --seed 7": "--seed=7 and --seeds=0-1 are the same; give one",
    "--seeds 0-3 --labels 4": "--labels is for a folder of samples",
    "--seeds 0-3 --rows seeds": "--rows='seeds' is unknown; did you mean 'seed'?",
    "--seeds 0-3 --rows seed --columns seed": "--rows=seed and --columns=seed are the same; choose another axis",
    "--seeds 0-3 --out sheet.jpg": "--out=sheet.jpg must be a file that ends in .png",
    "--out sheet.png": "--out=sheet.png is for a picture; give --classes or --seeds, or name a folder",
    "--trajectory gif --out path.png": "--out=path.png must be a file that ends in .gif",
    "--trajectory png --steps 2,3": "--trajectory takes several classes and seeds only; give one value of --steps",
    "--trajectory png --seeds 0-9": "--trajectory shows up to sampling.batch_size=4 images, not 80; choose fewer",
    "--trajectory png --interpolate seeds": "are different pictures; make one after the other",
    "--interpolate seeds --seeds 4": "--interpolate=seeds needs two seeds or more; give --seeds",
    "--interpolate seeds --points 1": "--points=1 must be from 2 to 100",
    "--seeds 0-3 --points 3": "--points is the number of columns of --interpolate, which is not given",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_answered_in_one_line_and_writes_nothing(trained, capsys, tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        picture(trained, *line.split())
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and MISTAKES[line] in said.err
    assert not said.out and not any(tmp_path.iterdir()) and not list(trained.glob("*.png"))


def test_an_unconditional_network_has_no_classes_and_no_guidance(wide, capsys, tmp_path):
    for line, words in (
        ("--classes 1", "--classes=1: this network is unconditional; leave it out"),
        ("--interpolate classes", "--interpolate=classes: this network is unconditional; use seeds"),
        ("--cfg_scale 1,2", "sampling.cfg_scale=2.0 needs a null label"),
    ):
        with pytest.raises(SystemExit, match="2"):
            picture(wide, *line.split(), "--out", tmp_path / "sheet.png")
        assert words in capsys.readouterr().err


def test_seeds_and_checkpoints_are_read(trained):
    assert parts("0-2,7,5-5", "seed") == [0, 1, 2, 7, 5]
    newest = trained / "checkpoints" / "step-0000020"
    assert folders_of(trained, [None]) == [newest]
    assert folders_of(newest, ["step-10", "0000015", str(newest)])[:2] == [
        trained / "checkpoints" / "step-0000010", trained / "checkpoints" / "step-0000015"]  # fmt: skip


def test_checkpoints_of_runs_with_one_name_are_told_apart():
    def names(*places):
        return names_of([Path(place) for place in places])

    assert names("/a/run/checkpoints/step-0000010", "/a/run/checkpoints/step-0000020") == ["step 10", "step 20"]
    assert names("/a/one/checkpoints/step-0000010", "/a/two/checkpoints/step-0000010") == ["one step 10", "two step 10"]
    assert names("/a/run/checkpoints/step-0000010", "/b/run/checkpoints/step-0000010") == [
        "a/run step 10", "b/run step 10"]  # fmt: skip
    assert names("/a/emas/std-0.050", "/b/emas/std-0.050") == ["a/emas/std-0.050", "b/emas/std-0.050"]
    assert names("/\u5de6/checkpoints/step-0000010", "/\u53f3/checkpoints/step-0000010") == [
        "run step 10 (1)", "run step 10 (2)"]  # fmt: skip
