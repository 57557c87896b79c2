"""Sheets: every image is pasted pixel by pixel, every label is there, none is cut."""

import numpy as np
import pytest
from PIL import Image

import fastdit
from fastdit.sheets import fitted, font_of, in_letters, in_rows, labelled, stacked, tiled, wrapped


def colors(count: int, height: int = 20, width: int = 30) -> np.ndarray:
    """Images of noise, so that each can be found in a page."""
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def places(page: Image.Image, image: np.ndarray) -> list[tuple[int, int]]:
    """Where (y, x) an image stands in a page, pixel by pixel."""
    page, (height, width) = np.asarray(page.convert("RGB")), image.shape[:2]
    corners = np.argwhere((page[: len(page) - height + 1, : page.shape[1] - width + 1] == image[0, 0]).all(-1))
    return [(y, x) for y, x in corners if (page[y : y + height, x : x + width] == image).all()]


def ink_at_the_edge(page: Image.Image) -> bool:
    dark = np.asarray(page.convert("L")) < 128
    return bool(dark[:, 0].any() or dark[:, -1].any() or dark[0].any() or dark[-1].any())


@pytest.mark.parametrize("size", [(20, 30), (30, 20), (7, 5), (64, 300)])
@pytest.mark.parametrize("labels", [False, True])
def test_every_image_stands_once_in_its_row_and_column(size, labels):
    images = colors(7, *size)
    rows = in_rows(images, 3)
    said = {
        "title": "a title",
        "row_labels": ["one", "a much longer label", "3"],
        "columns_title": "settings",
        "column_labels": ["guidance 1.5"] * 3,
        "captions": [["0.123"] * len(row) for row in rows],
    }
    page = labelled(rows, **said if labels else {})
    found = [places(page, image) for image in images]
    assert all(len(place) == 1 for place in found)
    ys, xs = np.array(found)[:, 0].T
    assert (np.diff(ys.reshape(-1)[[0, 3, 6]]) > 0).all() and len(set(ys[:3])) == len(set(ys[3:6])) == 1
    assert (xs[:3] == xs[3:6]).all() and (np.diff(xs[:3]) > 0).all() and xs[6] == xs[0]
    assert not ink_at_the_edge(page) or not labels


def test_labels_take_room_and_are_never_cut():
    images = [colors(2, 8, 8)]
    bare, long = labelled(images), labelled(images, column_labels=["Cardigan Welsh corgi", "x" * 200])
    assert bare.width < long.width <= 2 * 12 * 11 + 20 and long.height > bare.height + 5 * 11  # wrapped, not endless
    assert not ink_at_the_edge(labelled(images, title="words " * 40, row_labels=["y" * 100]))
    assert not ink_at_the_edge(labelled(images, title="a title that is wide", columns_title="and what the columns are"))
    font = font_of(12)
    for text in ("Cardigan Welsh corgi", "x" * 200, "a\nb c", ""):
        lines = wrapped(text, font, 60)
        assert "".join("".join(lines).split()) == "".join(text.split())
        assert all(font.getlength(line) <= 60 for line in lines)
    assert wrapped("a\nb c", font, 60) == ["a", "b c"]


def test_the_font_grows_with_the_sheet_and_stays_readable_on_a_phone():
    """390 px wide: at least 9 of them for a line of text."""
    for count, width in ((1, 256), (8, 256), (10, 512), (3, 64)):
        page = labelled([np.zeros((count, width, width, 3), np.uint8)], column_labels=["1.5"] * count)
        bare = labelled([np.zeros((count, width, width, 3), np.uint8)])
        assert (page.height - bare.height) * 390 / page.width >= 9


def test_tiles_have_gaps_and_may_be_transparent():
    images = colors(3, 4, 6)
    page = np.asarray(tiled(in_rows(images, 2), gap=3))
    assert page.shape == (11, 15, 3) and (page[:4, 9:] == images[1]).all() and (page[7:, :6] == images[2]).all()
    assert (page[4:7] == 128).all() and (page[7:, 6:] == 128).all()
    clear = np.asarray(tiled(in_rows(images, 2), 3, None))
    assert clear.shape == (11, 15, 4) and (clear[4:7] == 0).all() and (clear[:4, :6, 3] == 255).all()
    both = stacked([tiled([images[:1]]), tiled([images])])
    assert both.size == (3 * 8 - 2, 8) and (np.asarray(both)[:4, :6] == images[0]).all()


def test_large_images_shrink_by_averaging_and_small_ones_stay():
    image = colors(1, 40, 20)[0]
    assert np.array_equal(np.asarray(fitted(image, 40)), image)
    small = np.asarray(fitted(image, 20)).astype(float)
    assert small.shape == (20, 10, 3)
    assert np.abs(small - image.reshape(20, 2, 10, 2, 3).mean((1, 3))).max() <= 1  # rounded once for each axis
    assert fitted(np.zeros((1000, 1, 3), np.uint8), 10).size == (1, 10)


def test_names_are_written_in_letters_that_the_font_has():
    assert in_letters("C\u00e3o d'\u00e1gua, na\u00efve 3/4 (x_0)", "3") == "Cao d'agua, naive 3/4 (x_0)"
    for name in ("\u540d\u524d", "a\u2192b", "\U0001f9a6", "a\nb", "\x00"):
        assert in_letters(name, "class 3") == "class 3"
    font, lacking = font_of(20), bytes(font_of(20).getmask("\uffff"))
    assert all(bytes(font.getmask(chr(code))) != lacking for code in range(33, 127))


def test_the_same_from_python():
    images = [Image.fromarray(image) for image in colors(5)]
    assert np.array_equal(np.asarray(fastdit.grid(images, columns=2)), np.asarray(tiled(in_rows(images, 2))))
    page = fastdit.grid(images, 2, captions="abcde")
    assert all(len(places(page, np.asarray(image))) == 1 for image in images) and not ink_at_the_edge(page)
    mixed = [images[0], colors(3)[1][:8, :8], np.kron(colors(3)[2], np.ones((2, 2, 1), np.uint8))]  # of three sizes
    assert all(len(places(fastdit.grid(mixed, 2), np.asarray(image))) == 1 for image in mixed)  # none is cut
    for arguments in ({"images": []}, {"images": images, "columns": 0}, {"images": images, "captions": ["a"]}):
        with pytest.raises(ValueError, match=r"grid\(\) got .* give one or more images"):
            fastdit.grid(**arguments)
