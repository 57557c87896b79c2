"""Sheets of images: rows and columns, with or without labels."""

import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastdit.files import replacing

Picture = np.ndarray | Image.Image  # uint8 (H, W, 3), or an image
Rows = Sequence[Sequence[Picture]]
INK, PAPER = "black", "white"
SMALLEST, WIDEST = 11, 12  # font size in pixels, at least; width of a label in font sizes, at most
CHARACTERS = 30  # font sizes in the width of a sheet: on a phone, a letter is then about as high as in a text


def tiled(rows: Rows, gap: int = 2, background: str | None = "grey") -> Image.Image:
    """Rows of images of one size, with `gap` pixels between them; transparent there without a background."""
    width, height = _image(rows[0][0]).size
    size = max(map(len, rows)) * (width + gap) - gap, len(rows) * (height + gap) - gap
    sheet = Image.new("RGB", size, background) if background else Image.new("RGBA", size)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            sheet.paste(_image(picture), (c * (width + gap), r * (height + gap)))
    return sheet


def labelled(
    rows: Rows,
    *,
    title: str = "",
    row_labels: Sequence[str] = (),
    columns_title: str = "",
    column_labels: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """Rows of images (H, W) with a title, labels beside the rows and above the columns, and captions below the images.

    Images are pasted pixel by pixel, in the middle of their place where they are smaller than the largest one. The font
    grows with the sheet, so that labels can be read where the whole sheet is as wide as a phone. Long labels are
    wrapped, or widen their column; none is cut.
    """
    rows = [[_image(picture) for picture in row] for row in rows]
    width, height = (max(image.size[axis] for row in rows for image in row) for axis in (0, 1))
    count, gap = max(map(len, rows)), max(2, width // 32)
    font = font_of(count * (width + gap) / CHARACTERS)
    widest = max(width, WIDEST * font.size)
    texts = [*column_labels, *(text for row in captions for text in row)]
    column = max([width, *(min(widest, _width(word, font)) for text in texts for word in text.split())])
    beside = [wrapped(text, font, widest) for text in row_labels]
    space = font.size // 2  # between a label and an image, and below a title
    margin = max([_width(text, font) + space for lines in beside for text in lines], default=0)
    above = [wrapped(text, font, column) for text in column_labels]
    below = [[wrapped(text, font, column) for text in row] for row in captions]
    line = sum(font.getmetrics())
    page_width = margin + count * (column + gap) + gap
    page_width = max(page_width, min(20 * font.size, max(_width(text, font) for text in title.split("\n")) + 2 * gap))
    heads = wrapped(title, font, page_width - 2 * gap)
    names = wrapped(columns_title, font, page_width - margin - 2 * gap)
    under_title = gap + line * len(heads) + space * bool(heads)
    top = under_title + line * (len(names) + max(map(len, above), default=0))
    under = [line * max(map(len, row), default=0) for row in below] or [0] * len(rows)
    steps = [max(height + under[r], line * len(beside[r]) if beside else 0) + gap for r in range(len(rows))]
    page = Image.new("RGB", (page_width, top + sum(steps) + gap), PAPER)
    draw = ImageDraw.Draw(page)

    def write(lines: Sequence[str], x: float, y: float, anchor: str) -> None:
        """anchor: la, lines begin at x; ma, they are centered there; ra, they end there."""
        for i, text in enumerate(lines):
            draw.text((x, y + i * line), text, INK, font, anchor)

    write(heads, gap, gap, "la")
    half = max((font.getlength(text) / 2 for text in names), default=0)
    write(names, margin + gap + max(half, count * (column + gap) / 2), under_title, "ma")
    for c, lines in enumerate(above):
        write(lines, margin + gap + c * (column + gap) + column / 2, top - line * len(lines), "ma")
    y = top
    for r, row in enumerate(rows):
        if beside:
            write(beside[r], margin - space + gap, y + max(0, height - line * len(beside[r])) / 2, "ra")
        for c, image in enumerate(row):
            x = margin + gap + c * (column + gap)
            page.paste(image, (x + (column - image.width) // 2, y + (height - image.height) // 2))
            if below:
                write(below[r][c], x + column / 2, y + height, "ma")
        y += steps[r]
    return page


def stacked(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets below each other."""
    page = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), PAPER)
    y = 0
    for sheet in sheets:
        page.paste(sheet, (0, y))
        y += sheet.height
    return page


def animated(frames: Sequence[Image.Image], frame_ms: int = 150, held_ms: int = 2000) -> dict[str, object]:
    """What `frames[0].save` needs to write a GIF of all frames that repeats, with the last one held."""
    durations = [frame_ms] * (len(frames) - 1) + [held_ms]
    return {"save_all": True, "append_images": frames[1:], "duration": durations, "loop": 0, "disposal": 2}


def save(images: list[Image.Image], out: Path) -> None:
    """Write a PNG, or several frames as a GIF."""
    with replacing(out) as file:
        images[0].save(file, format=out.suffix[1:], **animated(images) if len(images) > 1 else {})


def fitted(picture: Picture, side: int) -> Image.Image:
    """The image scaled down to at most `side` pixels in width and height; a smaller one as it is."""
    image = _image(picture)
    scale = min(1, side / max(image.size))
    return image.resize([max(1, round(scale * s)) for s in image.size], Image.Resampling.BOX)


def in_rows(items: Sequence, columns: int) -> list[Sequence]:
    """Items (N,) in rows of `columns`; the last one may be shorter."""
    return [items[i : i + columns] for i in range(0, len(items), columns)]


def in_letters(text: str, otherwise: str) -> str:
    """The text without accents, which Pillow's font lacks; `otherwise` where the font lacks its letters, too."""
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    return plain if plain.isascii() and plain.isprintable() else otherwise


def told_apart(names: Callable[[int], list[str]], depth: int, most: int) -> list[str]:
    """`names(depth)`, with as many folders, from `depth` to `most`, as make each another one; else also numbers."""
    for folders in range(depth, most + 1):
        found = names(folders)
        if len(set(found)) == len(found):
            return found
    return [f"{name} ({i})" for i, name in enumerate(names(depth), 1)]


@lru_cache(64)
def font_of(size: float) -> ImageFont.FreeTypeFont:
    """Pillow's own font in this size, or in the smallest one that can be read."""
    return ImageFont.load_default(round(max(size, SMALLEST)))


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """The lines of a text, broken between words, and within a word that is wider than `width`; [] for no text."""
    if "\n" in text:
        return [line for paragraph in text.split("\n") for line in wrapped(paragraph, font, width)]
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def _width(text: str, font: ImageFont.FreeTypeFont) -> int:
    return int(np.ceil(font.getlength(text)))


def _image(picture: Picture) -> Image.Image:
    return picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
