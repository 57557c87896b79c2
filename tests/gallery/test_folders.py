"""`fastdit grid`: any folder of images, pixel by pixel, in rows of classes."""

import numpy as np
import pytest
from PIL import Image

from fastdit.cli import main
from fastdit.gallery.folders import folder_grid
from helpers.commands import mistake
from helpers.evaluation import pictures, write_pngs

IMAGES = pictures(7, size=24)


def test_a_flat_folder_and_an_npz_fill_the_rows_in_order(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pngs(tmp_path / "flat", IMAGES)
    np.savez(tmp_path / "some.npz", IMAGES)
    main(["grid", "flat", "--columns", "3", "--rows", "2"])
    assert capsys.readouterr().out == "grid.png\n"
    main(["grid", "some.npz", "--columns", "3", "--rows", "2", "--out", "other.png"])
    page = np.asarray(Image.open("grid.png"))
    assert page.shape == (50, 76, 3) and (page == np.asarray(Image.open("other.png"))).all()
    for i in range(6):
        y, x = 26 * (i // 3), 26 * (i % 3)
        assert (page[y : y + 24, x : x + 24] == IMAGES[i]).all()
    assert folder_grid("flat", side=12, columns=7).size == (7 * 14 - 2, 12)


def test_class_folders_become_labelled_rows(tmp_path):
    for name, images in (("zebra", IMAGES[:3]), ("otter", IMAGES[3:])):
        write_pngs(tmp_path / name, images)
    page = np.asarray(folder_grid(tmp_path, columns=3))
    found = [[(y, x) for y, x in np.argwhere((page[:-23, :-23] == image[0, 0]).all(-1))
              if (page[y : y + 24, x : x + 24] == image).all()] for image in IMAGES]  # fmt: skip
    assert [len(places) for places in found] == [1, 1, 1, 1, 1, 1, 0]  # three of each class
    (y, left), (below, _) = found[3][0], found[0][0]
    assert y < below and left > 30  # otter comes first; names stand beside the rows
    assert (page[y : y + 24, :left].min() < 100) and (page[below : below + 24, :left].min() < 100)
    assert folder_grid(tmp_path, columns=3, labels=False).size == (76, 76)


def test_sizes_may_differ_and_names_may_be_in_any_language(tmp_path):
    write_pngs(tmp_path / "\u540d", IMAGES[:2])
    write_pngs(tmp_path / "b", IMAGES[2:3, :10, :20])
    page = np.asarray(folder_grid(tmp_path))
    small = IMAGES[2, :10, :20]
    assert any((page[y : y + 10, x : x + 20] == small).all() for y, x in np.argwhere((page == small[0, 0]).all(-1)))
    assert Image.fromarray(page).width > 2 * 26 + 30


def test_the_folder_of_sample_shows_its_images(tmp_path):
    write_pngs(tmp_path / "out" / "images", IMAGES)
    (tmp_path / "out" / "sampling.json").write_text('{"num_samples": 7}')
    Image.new("RGB", (500, 500)).save(tmp_path / "out" / "grid.png")
    assert folder_grid(tmp_path / "out", columns=7).size == (7 * 26 - 2, 24)


@pytest.mark.parametrize(
    "line, words",
    [
        ("nowhere", "FOLDER=nowhere does not exist; give a folder of images or an .npz file"),
        ("", "name one folder of images"),
        ("empty", "FOLDER=empty"),
        ("flat --rows 0", "--rows=0 must be 1 or more"),
        ("flat --size -1", "--size=-1 must be 1 or more"),
        ("flat --labels", "--labels: flat has no classes, such as subfolders; leave it out"),
        ("flat --out flat", "--out=flat must be a file that ends in .png"),
        ("flat x=1", "unexpected argument 'x=1'"),
        ("broken", "FOLDER=broken: a.png cannot be read"),
        ("broken.npz", "FOLDER=broken.npz cannot be read"),
        ("run", "FOLDER=run is a run or a checkpoint; sample it first"),
    ],
)
def test_a_mistake_is_answered_in_one_line(tmp_path, monkeypatch, capsys, line, words):
    monkeypatch.chdir(tmp_path)
    write_pngs(tmp_path / "flat", IMAGES[:1])
    for name in ("empty", "broken", "run/checkpoints"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "broken" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nxx")
    (tmp_path / "broken.npz").write_bytes(b"no")
    assert words in mistake(capsys, "grid", *line.split())
    assert not (tmp_path / "grid.png").exists()
