"""Hostile images, and hostile members of the tar files of shards."""

import io
import os
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from chaos import contents
from chaos.corpus import Case, Good, copied, seal
from helpers.awkward import png_of


def cases(good: Good) -> Iterator[Case]:
    for name, make in IMAGES.items():
        refused = None if name == OPEN_FILES else False  # those come and go while they are listed
        yield Case("images", name, partial(image, good, make), refused=refused)
    for name, members in MEMBERS.items():
        yield Case("shards", name, partial(shard, good, members))


# images --------------------------------------------------------------------------------------------------------------


def png(width: int, height: int, *chunks: tuple[bytes, bytes], data: bytes = b"", depth: int = 8) -> bytes:
    """Gray, compressed; its pixels are zeros unless `data` is given."""
    rows = zlib.compressobj(9)
    body = data or b"".join([*(rows.compress(bytes(1 + width)) for _ in range(min(height, 20_000))), rows.flush()])
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return png_of((b"IHDR", header), *chunks, (b"IDAT", body), (b"IEND", b""))


def tiff(entries: list[tuple[int, int, int, int]], next_ifd: int) -> bytes:
    rows = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\x00" + struct.pack("<IH", 8, len(entries)) + rows + struct.pack("<I", next_ifd)


def postscript(path: Path, canary: Path) -> bytes:
    return f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({canary}) (w) file closefile showpage\n".encode()


def jpeg(**options) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 40), "gray").save(out, "JPEG", **options)
    return out.getvalue()


OPEN_FILES = "link to the open files"
BOMB = zlib.compress(bytes(1 << 28), 9)  # 256 MiB
SIZES = [(256, 3, 1, 60_000), (257, 3, 1, 60_000)]  # tags, types, counts and values
# the file's name, and its content: bytes, or a function (path, canary) that returns them or makes something else
IMAGES: dict[str, tuple[str, bytes | Callable[[Path, Path], bytes | None]]] = {
    "PNG of 60000 x 60000": ("a.png", lambda path, canary: png(60_000, 60_000, data=zlib.compress(bytes(1 << 20)))),
    "PNG of 13000 x 13000, which is read": ("a.png", lambda path, canary: png(13_000, 13_000)),
    "PNG of 1 x 10^7": ("a.png", lambda path, canary: png(1, 10_000_000, data=zlib.compress(bytes(20_000_000)))),
    "PNG of 10^7 x 1": ("a.png", lambda path, canary: png(10_000_000, 1)),
    "PNG with a text bomb": ("a.png", lambda path, canary: png(40, 40, (b"zTXt", b"a\0\0" + BOMB))),
    "PNG with a profile bomb": ("a.png", lambda path, canary: png(40, 40, (b"iCCP", b"a\0\0" + BOMB))),
    "PNG with 256 MiB of rows too many": ("a.png", lambda path, canary: png(40, 40, data=BOMB)),
    "GIF of 65535 x 65535": (
        "a.gif", b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x08\x01\0"
    ),
    "PPM of 10^9 x 10^9": ("a.ppm", b"P6 1000000000 1000000000 255\n" + bytes(100)),
    "PPM with a number of 10^6 digits": ("a.ppm", b"P6 " + b"9" * 1_000_000 + b" 1 255\n"),
    "BMP of -2^31 rows": (
        "a.bmp", b"BM" + struct.pack("<IHHIIiiHH", 154, 0, 0, 54, 40, 40, -(2**31), 1, 24) + bytes(124)
    ),
    "TGA of 65535 x 65535": ("a.tga", struct.pack("<BBBHHBHHHHBB", 0, 0, 10, 0, 0, 0, 0, 0, 65535, 65535, 24, 0)),
    "TIFF whose next page is itself": ("a.tif", tiff(SIZES, 8)),
    "TIFF with 2^32 - 1 strips": ("a.tif", tiff([*SIZES, (273, 4, 2**32 - 1, 8), (279, 4, 2**32 - 1, 8)], 0)),
    "WebP whose size is a lie": ("a.webp", b"RIFF\xff\xff\xff\x7fWEBPVP8L\xff\xff\xff\x7f/\xff\xff\xff\xff"),
    "AVIF without content": ("a.avif", b"\0\0\0\x1cftypavif\0\0\0\0avifmif1\0\0\xff\xffmeta"),
    "PostScript in a JPEG's name": ("a.jpg", postscript),
    "PostScript in a PNG's name": ("a.png", postscript),
    "JPEG with EXIF of garbage": ("a.jpg", jpeg(exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 2000)),
    "JPEG with a profile bomb": ("a.jpg", jpeg(icc_profile=bytes(60_000))),
    "text": ("a.jpeg", b"not an image"),
    "SVG": ("a.svg", b"<svg onload='alert(1)'/>"),
    "pickle": ("a.png", lambda path, canary: contents.BINARY["pickle"](canary)),
    "a name with a line break": ("a\nerror: b.png", b"x"),
    "a name that is not UTF-8": (os.fsdecode(b"\xff\xfe.png"), b"x"),
    "a name with escape codes": ("\x1b[2J\x1b]0;x\x07.png", b"x"),
    "a name that looks like an option": ("--overwrite.png", b"x"),
    "FIFO": ("a.png", lambda path, canary: os.mkfifo(path)),
    "socket": ("a.png", lambda path, canary: contents.listening(path)),
    "device": ("a.png", lambda path, canary: contents.SPECIAL["device"](path)),
    "link to /dev/zero": ("a.png", lambda path, canary: path.symlink_to("/dev/zero")),
    "link to itself": ("a.png", lambda path, canary: path.symlink_to("a.png")),
    "folder link to the class": ("loop", lambda path, canary: path.symlink_to(".")),
    "folder link to the root of the images": ("loop", lambda path, canary: path.symlink_to("..")),
    OPEN_FILES: ("files", lambda path, canary: path.symlink_to("/proc/self/fd")),
    "1 TiB of zeros": ("a.png", lambda path, canary: contents.enormous(path)),
}  # fmt: skip


def image(good: Good, make: tuple, folder: Path) -> list[list[str]]:
    copy = copied(good, "images", folder)
    name, content = make
    path = copy / "0" / name
    data = content if isinstance(content, bytes) else content(path, folder / "canary")
    if data is not None:
        path.write_bytes(data)
    size = ["--image-size", "32", "--workers", "1"]
    return [["extract_features.py", "--images", f"{copy}", "--out", f"{folder}/out/latents", "--vae",
             f"{good.world}/vae", *size]]  # fmt: skip


# tar members ---------------------------------------------------------------------------------------------------------


def member(name: str, data: bytes = b"3", kind: bytes = tarfile.REGTYPE, target: str = "", **fields: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, target
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def pax(key: str, value: str) -> bytes:
    """A header with a record that replaces a field of the member after it."""
    record = f" {key}={value}\n"
    length = len(record) + len(str(len(record) + 2))
    return member("pax", f"{length}{record}".encode(), tarfile.XHDTYPE)


MEMBERS = {
    "a name with ../": member("../../../canary.cls"),
    "an absolute name": member("/tmp/canary.cls"),
    "a symbolic link": member("999999999.cls", b"", tarfile.SYMTYPE, "/etc/passwd"),
    "a hard link": member("999999999.cls", b"", tarfile.LNKTYPE, "../../etc/passwd"),
    "two links to each other": member("999999999.cls", b"", tarfile.SYMTYPE, "999999998.cls")
    + member("999999998.cls", b"", tarfile.SYMTYPE, "999999999.cls"),
    "a character device": member("999999999.cls", b"", tarfile.CHRTYPE, devmajor=1, devminor=5),
    "a FIFO": member("999999999.cls", b"", tarfile.FIFOTYPE),
    "a folder": member("999999999.cls", b"", tarfile.DIRTYPE),
    "a member of 10^12 bytes": member("999999999.cls", size=10**12),
    "a negative size": member("999999999.cls", size=-1024),
    "a label of 10^6 digits": member("999999999.cls", b"9" * 1_000_000),
    "a negative label": member("999999999.cls", b"-1"),
    "a label that is no number": member("999999999.cls", b"\xd9\xa3x"),
    "2000 long names in a row": b"".join(member("././@LongLink", b"a" * 20 + b"\0", b"L") for _ in range(2000)),
    "a pax header with another path": pax("path", "../../canary.cls") + member("999999999.cls"),
    "a pax header with a negative size": pax("size", "-5") + member("999999999.cls"),
    "a pax header with a size of text": pax("size", "x") + member("999999999.cls"),
    "a sparse file of 10^15 bytes": member("999999999.cls", b"", b"S"),
    "a pickled array": member("999999999.moments.npy", contents.object_npy(Path("canary"))) + member("999999999.cls"),
    "no end": b"\xff" * 512,
}  # fmt: skip


def shard(good: Good, members: bytes, folder: Path) -> list[list[str]]:
    copy = copied(good, "../latents", folder)
    path = copy / "shard-00000.tar"
    path.write_bytes(path.read_bytes().rstrip(b"\0").ljust(path.stat().st_size - 1024, b"\0") + members + bytes(1024))
    seal(path)
    return good.read_latents(copy, folder / "out")
