"""Image folders, ADM's crop, the way to pixels and back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdit.data.images import Skipped, center_crop, list_images, load_crop, to_pixels, to_uint8
from helpers import GOLDEN

ARRAYS = np.load(GOLDEN / "center_crop.npz", allow_pickle=False)


@pytest.mark.parametrize("key", [key for key in ARRAYS.files if "/crop" in key])
def test_center_crop_gives_the_recorded_bytes(key):
    source, size = key.split("/crop")
    crop = center_crop(Image.fromarray(ARRAYS[f"{source}/in"]), int(size))
    np.testing.assert_array_equal(np.asarray(crop), ARRAYS[key])


def test_every_gray_level_survives_the_conversion_to_pixels_and_back():
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    pixels = to_pixels(image)
    assert pixels.shape == (1, 3, 16, 16) and pixels.min() == -1 and pixels.max() == 1
    assert torch.equal(to_uint8(pixels), image)


def test_uint8_is_clamped_and_truncated():
    pixels = torch.tensor([-3.0, -1.0, 0.0, 0.99, 1.0, 3.0]).view(1, 1, 6).expand(3, 1, 6)
    assert to_uint8(pixels)[0, :, 0].tolist() == [0, 0, 128, 254, 255, 255]


def test_every_mode_becomes_rgb_and_the_orientation_tag_is_ignored(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    image = Image.fromarray(grey)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees": ADM does not
    variants = {
        "L": image,
        "P": image.convert("RGB").quantize(256),
        "RGBA": Image.merge("RGBA", (image, image, image, Image.new("L", (8, 8), 7))),
        "LA": Image.merge("LA", (image, Image.new("L", (8, 8), 7))),
    }
    for mode, variant in variants.items():
        assert variant.mode == mode
        variant.save(tmp_path / f"{mode}.png", exif=exif)
        crop = load_crop(tmp_path / f"{mode}.png", 8)
        np.testing.assert_array_equal(crop, np.stack([grey] * 3, axis=-1))


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def test_classes_and_paths_are_sorted_and_hidden_files_ignored(tmp_path):
    for name in ("b/2.png", "b/10.JPEG", "b/deep/er/1.webp", "a/x.bmp", ".cache/no.png", "a/.hidden.png"):
        write(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    folder = list_images(tmp_path)
    assert folder.class_names == ("a", "b")
    assert folder.paths == ("a/x.bmp", "b/10.JPEG", "b/2.png", "b/deep/er/1.webp")
    assert folder.labels == (0, 1, 1, 1) and len(folder) == 4


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "is not a folder"),
        ([], "is empty"),
        (["1.png", "a/2.png"], "outside any class subfolder"),
        (["a/1.png", "b/.keep.png"], "class subfolder 'b' without images"),
    ],
)
def test_folders_that_are_not_image_folders_are_refused(tmp_path, files, message):
    root = tmp_path / "images"
    if files is not None:
        root.mkdir()
        for name in files:
            write(root / name)
    with pytest.raises(ValueError, match=message) as error:
        list_images(root)
    assert str(root) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "header"])
def test_unreadable_images_say_why(tmp_path, damage):
    path = tmp_path / "x.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"hello", "truncated": data[:5000], "header": data[8:]}[damage])
    with pytest.raises(ValueError, match=r"\w+Error: "):
        load_crop(path, 32)


@pytest.mark.parametrize(("total", "allowed"), [(1, 1), (199, 1), (200, 2), (1000, 10)])
def test_one_unreadable_image_or_one_in_a_hundred_is_tolerated(total, allowed):
    skipped = Skipped(total)
    for i in range(allowed):
        skipped.add(f"a/{i}.png", "bad\nfile")
    assert skipped.lines[0] == "a/0.png\tbad file"
    with pytest.raises(ValueError, match=f"more than {allowed} of {total} images cannot be read"):
        skipped.add("a/z.png", "bad")
