"""Image folders, ADM's center crop, conversion to pixels and back."""

import os
import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdit.data.images import Skipped, center_crop, load_crop, random_crop, read_image, to_pixels, to_uint8
from fastdit.data.sources import list_images, remarks
from helpers import GOLDEN
from helpers.awkward import deep_png

ARRAYS = np.load(GOLDEN / "center_crop.npz", allow_pickle=False)


@pytest.mark.parametrize("key", [key for key in ARRAYS.files if "/crop" in key])
def test_center_crop_gives_the_recorded_bytes(key):
    source, size = key.split("/crop")
    crop = center_crop(Image.fromarray(ARRAYS[f"{source}/in"]), int(size))
    np.testing.assert_array_equal(np.asarray(crop), ARRAYS[key])


def places(width: int, height: int) -> np.ndarray:
    """An image whose red and green are x and y."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, 0 * x], -1).astype(np.uint8)


@pytest.mark.parametrize(
    "form, size, draws, least, slices",
    [
        ((40, 20), 20, (0.9, 0.0, 0.5), 1.0, np.s_[:, :20]),  # the share is always 1
        ((40, 20), 20, (0.9, 0.999, 0.5), 1.0, np.s_[:, 20:]),
        ((40, 20), 20, (0.9, 0.5, 0.5), 0.01, np.s_[:, 10:30]),  # a smaller share would enlarge
        ((80, 60), 20, (0.0, 0.5, 0.25), 0.01, np.s_[10:30, 30:50]),  # as many pixels as the crop
        ((80, 60), (40, 20), (0.0, 0.0, 0.999), 0.5, np.s_[40:, :40]),
    ],
)
def test_a_random_crop_is_where_its_draws_say(form, size, draws, least, slices):
    pixels = places(*form)
    np.testing.assert_array_equal(random_crop(Image.fromarray(pixels), size, draws, least), pixels[slices])


def test_a_random_crop_of_the_largest_share_is_the_center_crop_of_a_square_or_small_image():
    rng, draws = np.random.default_rng(0), (1 - 2**-53, 0.9, 0.1)
    for side in (64, 50, 16, 9):
        image = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        for least in (1.0, 0.1) if side <= 16 else (1.0,):
            np.testing.assert_array_equal(random_crop(image, 16, draws, least), center_crop(image, 16))


def test_a_random_crop_has_its_size_and_share_whatever_the_image():
    """Its width in the source is the share of the largest crop's, to the pixel and the half that resizing blurs."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        width, height, w, h = (int(n) for n in rng.integers(1, 250, 4))
        least, draws = rng.uniform(0.01, 1), rng.random(3)
        found = np.asarray(random_crop(Image.fromarray(places(width, height)), (w, h), draws, least), int)
        assert found.shape == (h, w, 3)
        largest, whole = min(width / w, height / h) * w, max(w / width, h / height)
        low = min(1, max(least, whole))
        covered = (low + draws[0] * (1 - low)) * largest
        if w > 20 and covered > 20:
            # edges are left out, as a bicubic filter overshoots there
            slope = (found[h // 2, w - 6, 0] - found[h // 2, 5, 0]) / (w - 11)
            assert slope * w == pytest.approx(covered, rel=0.1, abs=4)


def test_every_gray_level_survives_the_conversion_to_pixels_and_back():
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    pixels = to_pixels(image)
    assert pixels.shape == (1, 3, 16, 16) and pixels.min() == -1 and pixels.max() == 1
    assert torch.equal(to_uint8(pixels), image)


def test_uint8_is_clamped_and_truncated():
    pixels = torch.tensor([-3.0, -1.0, 0.0, 0.99, 1.0, 3.0]).view(1, 1, 6).expand(3, 1, 6)
    assert to_uint8(pixels)[0, :, 0].tolist() == [0, 0, 128, 254, 255, 255]


GRAY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "I;16", "I;16B", "big I"])
def test_opaque_images_of_every_mode_become_their_rgb(tmp_path, mode):
    image = Image.fromarray(GRAY)
    path, wanted = tmp_path / "x.png", GRAY
    if mode == "L":
        image.save(path)
    elif mode == "P":
        image.convert("RGB").quantize(256).save(path)
    elif mode == "1":
        wanted = (GRAY > 127).astype(np.uint8) * 255
        image.point(lambda v: 255 * (v > 127)).convert("1").save(path)
    elif mode == "CMYK":
        path = tmp_path / "x.tif"
        image.convert("RGB").convert("CMYK").save(path)
    elif mode == "big I":
        path = tmp_path / "x.tif"
        Image.fromarray(GRAY.astype(np.int32) * 257).save(path)
    else:
        path = tmp_path / ("x.png" if mode == "I;16" else "x.tif")
        Image.fromarray(GRAY.astype(np.uint16) * 257 + (GRAY > 9)).save(path)
    np.testing.assert_array_equal(load_crop(path, 8), np.stack([wanted] * 3, axis=-1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P with a transparent color", "L with a transparent gray"])
def test_transparent_pixels_are_white(tmp_path, mode):
    alpha = Image.fromarray(np.tile(np.array([0, 255, 0, 255, 51, 255, 255, 255], np.uint8), (8, 1)))
    image, wanted = Image.fromarray(GRAY), GRAY.astype(float)
    if mode == "RGBA":
        Image.merge("RGBA", (image, image, image, alpha)).save(tmp_path / "x.png")
    elif mode == "LA":
        Image.merge("LA", (image, alpha)).save(tmp_path / "x.png")
    elif mode.startswith("P"):
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(tmp_path / "x.png", transparency=0)
    else:
        image.save(tmp_path / "x.png", transparency=8)
    if mode in ("RGBA", "LA"):
        share = np.asarray(alpha) / 255
        wanted = wanted * share + 255 * (1 - share)
    else:
        with Image.open(tmp_path / "x.png") as stored:
            hidden = np.asarray(stored) == stored.info["transparency"]
        assert hidden.sum() == 1
        wanted = np.where(hidden, 255, wanted)
    crop = load_crop(tmp_path / "x.png", 8)
    assert np.abs(crop - wanted[..., None]).max() <= 1


DEEP = np.random.default_rng(1).integers(0, 65536, (8, 8, 4))
DEEP[0, :2], DEEP[1] = [[0], [65535]], [1000, 2000, 3000, 65535]


def tiff(values: np.ndarray, photometric: int, order: str, bits: int = 16, signed: bool = False) -> BytesIO:
    """A TIFF file with one strip; 12 bits are packed."""
    height, width, channels = values.shape
    if bits == 12:
        data = b"".join(((int(a) << 12) + int(b)).to_bytes(3, "big") for a, b in values.reshape(-1, 2))
    else:
        data = values.astype(f"{order}{'i' if signed else 'u'}{bits // 8}").tobytes()
    many = [bits] * channels, [2 if signed else 1] * channels
    tags = [(256, [width]), (257, [height]), (258, many[0]), (259, [1]), (262, [photometric]), (273, [8]),
            (277, [channels]), (278, [height]), (279, [len(data)]), *([(338, [2])] * (channels == 4)), (339, many[1])]
    start, entries, beyond = 8 + len(data) + 6 + 12 * len(tags), b"", b""
    for tag, numbers in tags:
        packed = struct.pack(f"{order}{len(numbers)}H", *numbers)
        if len(packed) > 4:
            packed, beyond = struct.pack(f"{order}I", start + len(beyond)), beyond + packed
        entries += struct.pack(f"{order}HHI", tag, 3, len(numbers)) + packed.ljust(4, b"\0")
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8 + len(data))
    table = struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", 0)
    return BytesIO(head + data + table + beyond)


def on_white(values: np.ndarray, alpha: np.ndarray | float = 65535.0) -> np.ndarray:
    return (values * (alpha / 65535) + 65535 - alpha) / 257


@pytest.mark.parametrize(
    ("file", "wanted", "most"),
    [
        (BytesIO(deep_png(DEEP[..., :1])), DEEP[..., :1] / 257, 0.5),
        (BytesIO(deep_png(DEEP[..., :1], [1000])), np.where(DEEP[..., :1] == 1000, 255, DEEP[..., :1] / 257), 0.5),
        (BytesIO(deep_png(DEEP[..., 2:])), on_white(DEEP[..., 2:3], DEEP[..., 3:]), 2.5),
        (BytesIO(deep_png(DEEP[..., :3])), DEEP[..., :3] / 257, 2.5),
        (BytesIO(deep_png(DEEP)), on_white(DEEP[..., :3], DEEP[..., 3:]), 2.5),
        (tiff(DEEP[..., :1], 1, "<"), DEEP[..., :1] / 257, 0.5),
        (tiff(DEEP[..., :1], 1, ">"), DEEP[..., :1] / 257, 0.5),
        (tiff(DEEP[..., :1], 0, "<"), 255 - DEEP[..., :1] / 257, 0.5),
        (tiff(DEEP[..., :1] // 2, 1, ">", signed=True), DEEP[..., :1] // 2 / 257, 0.5),
        (tiff(DEEP[..., :1], 1, "<", bits=32), DEEP[..., :1] / 257, 0.5),
        (tiff(DEEP[..., :1] // 16, 1, "<", bits=12), DEEP[..., :1] // 16 * 255 / 4095, 0.5),
        (tiff(DEEP[..., :3], 2, "<"), DEEP[..., :3] / 257, 2.5),
        (tiff(DEEP[..., :3], 2, ">"), DEEP[..., :3] / 257, 2.5),
        (tiff(DEEP, 2, "<"), on_white(DEEP[..., :3], DEEP[..., 3:]), 2.5),
        (tiff(255 - GRAY[..., None], 0, "<", bits=8), GRAY[..., None], 0.5),
    ],
)
def test_deep_images_of_every_kind_are_as_their_values_say(file, wanted, most):
    """To half a level in gray; in color, Pillow cuts off the lower byte, and again when it blends."""
    assert np.abs(read_image(file, None)[0] - wanted).max() <= most


def test_a_transparent_color_of_16_bits_is_refused():
    with pytest.raises(ValueError, match="its transparent color has 16 bits; save it with 8 bits or an alpha channel"):
        read_image(BytesIO(deep_png(DEEP[..., :3], [1000, 2000, 3000])), None)


def test_the_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    Image.fromarray(GRAY).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(load_crop(tmp_path / "x.png", 8)[..., 0], np.rot90(GRAY, -1))


@pytest.mark.parametrize("values", [np.full((8, 8), 70_000, np.int32), np.full((8, 8), 0.5, np.float32)])
def test_values_without_a_known_white_point_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="70000 are outside the range of a 16-bit image|floating-point values"):
        load_crop(tmp_path / "x.tif", 8)


def test_only_raster_decoders_are_started(tmp_path, monkeypatch):
    (tmp_path / "e.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(ValueError, match="UnidentifiedImageError"):
        load_crop(tmp_path / "e.jpg", 8)


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


def test_what_is_not_read_is_named_and_nothing_is_read_twice(tmp_path):
    for name in ("a/1.png", "a/deep/2.png", "b/3.png"):
        write(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "a" / "photo.heic").write_text("x")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "a" / "broken.png").symlink_to("nowhere.png")
    (tmp_path / "a" / "deep" / "up").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "b" / "across").symlink_to(tmp_path / "a" / "deep", target_is_directory=True)
    folder = list_images(tmp_path)
    assert folder.paths == ("a/1.png", "a/deep/2.png", "b/3.png")
    assert dict(line.split("\t") for line in folder.ignored) == {
        "a/notes.txt": "name ends in .txt",
        "a/photo.heic": "name ends in .heic",
        "a/pipe.png": "not a regular file",
        "a/broken.png": "not a regular file",
        "a/deep/up": "a second path to a folder that was already read",
        "b/across": "a second path to a folder that was already read",
    }
    about, line = remarks(folder)
    assert about == f"images={tmp_path}: class folders, 3 images, 2 classes"
    assert line.startswith("ignored 6 files (") and "1 x name ends in .heic" in line


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    write(tmp_path / "a" / "deep" / "1.png")
    write(tmp_path / "a" / "2.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(ValueError, match="deep cannot be read .Permission denied.; make it readable, or remove it"):
        list_images(tmp_path)


def test_numbered_classes_in_the_order_of_text_are_remarked_upon(tmp_path):
    for name in ("0", "1", "2", "10"):
        write(tmp_path / name / "1.png")
    _, line = remarks(list_images(tmp_path))
    assert "label 0, 1, 2, ... are 0, 1, 10, 2, ...; pad them with zeros" in line
    (tmp_path / "10").rename(tmp_path / "3")
    assert len(remarks(list_images(tmp_path))) == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "does not exist; give a folder of class folders"),
        ([], "is empty"),
        (["1.png", "a/2.png"], "has 1 image beside its subfolders"),
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
