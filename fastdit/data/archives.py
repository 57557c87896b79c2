"""Images from any source: `open_images`. Images in tar files (WebDataset's and ImageNet's) are read in place.

A tar file is indexed once; then each image is one read at its offset.
"""

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fastdit.data.columns import SPLITS, cifar, is_packed, packed_files, parquet
from fastdit.data.images import EXTENSIONS, skip_line
from fastdit.data.manifest import is_shards
from fastdit.data.matlab import structures
from fastdit.data.sources import (
    KINDS,
    LABEL_KEYS,
    ImageSource,
    list_images,
    list_rows,
    numbered,
    of_one_split,
    version_of,
)
from fastdit.errors import counted
from fastdit.files import TarHeader, tar_members

MOST, MOST_TEXT = 1 << 30, 1 << 20  # bytes of an image, and of a label


def open_images(root: str | Path) -> ImageSource:
    """The images of any source that is known; ValueError if there are none, or if they cannot be used as they are.

    `cifar-10-python.tar.gz/test` are the test images of the archive.
    """
    root = Path(root)
    if root.parent.is_file():
        return split_of(root.parent, root.name)
    if root.is_file():
        suffix = root.suffix.lower()
        if suffix in (".csv", ".jsonl", ".ndjson"):
            return list_rows(root)
        if suffix == ".parquet":
            return parquet(root, [root])
        if is_tar(root):
            return tar_archive(root)
        raise ValueError(f"images={root} is of no known kind; give {KINDS}")
    if is_shards(root):
        raise ValueError(f"images={root} holds latents, not images; train on them with data.shards={root}")
    if root.is_dir():
        for folder in (root, root / "data"):  # the second is where the Hugging Face hub keeps them
            if files := sorted(folder.glob("*.parquet")):
                return parquet(root, files)
        tars, visible = sorted(root.glob("*.tar")), root.glob("[!.]*")
        if tars and not any(path.is_dir() for path in visible):
            loose = [path.name for path in root.iterdir() if path.name.lower().endswith(EXTENSIONS)]
            if loose:
                some = counted(len(loose), "image")
                raise ValueError(f"images={root} holds {some}, such as {min(loose)}, beside "
                                 f"{counted(len(tars), 'tar file')}, such as {tars[0].name}; move one kind "
                                 "away")  # fmt: skip
            return webdataset(root, tars)
    return list_images(root)


def is_there(path: Path) -> bool:
    """Whether there is a file or folder at `path`, or a file of which it names a split."""
    return path.exists() or path.parent.is_file()


def split_of(file: Path, split: str) -> ImageSource:
    """The images of ARCHIVE/SPLIT."""
    if split not in SPLITS or not is_tar(file) or not is_cifar(file):
        raise ValueError(f"images={file}/{split} is no source of images: {file} is a file, and only CIFAR's archives "
                         f"have splits, {' and '.join(f'ARCHIVE/{name}' for name in SPLITS)}")  # fmt: skip
    return cifar(file, split)


def is_cifar(file: Path) -> bool:
    return is_packed(file) or next((name for name, _ in members(file)), "").startswith("cifar-")


def is_tar(file: Path) -> bool:
    """Whether a file is a tar file, as it is or compressed by gzip; of the others, xz reads zeros without an end."""
    try:
        with tarfile.open(file, "r:gz" if is_packed(file) else "r:", tarinfo=TarHeader):
            return True
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError, OSError):
        return False


class Slice(NamedTuple):
    """A part of a file."""

    file: Path
    offset: int
    size: int

    def read(self, most: int = MOST) -> bytes:
        """ValueError, before anything is read, if there are more than `most` bytes."""
        with self.file.open("rb", buffering=0) as file:
            if self.size > most or self.offset + self.size > os.fstat(file.fileno()).st_size:
                raise ValueError(
                    f"{self.size} bytes at byte {self.offset} of {self.file} are more than the file holds, or than the "
                    f"{most} that are read"
                )
            file.seek(self.offset)
            return file.read(self.size)


def members(file: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[str, Slice]]:
    """Name and place of the regular files in a tar file, or in one within it from byte `start` to `stop`."""
    try:
        with file.open("rb") as raw:
            raw.seek(start)
            with tarfile.open(fileobj=raw, mode="r:", tarinfo=TarHeader) as tar:
                for member in tar_members(tar):
                    if stop is not None and member.offset >= stop:
                        break
                    if member.isreg():
                        yield member.name, Slice(file, member.offset_data, member.size)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{file} is not an uncompressed tar file ({error}); copy it again, or decompress it") from None


def tar_archive(file: Path) -> ImageSource:
    """A tar file of images: CIFAR's, ImageNet's for training or validation, or a WebDataset's."""
    if is_cifar(file):
        return cifar(file)
    first = next((name for name, _ in members(file)), "")
    if first.endswith(".tar"):
        return imagenet_train(file)
    if Path(first).name.startswith("ILSVRC2012_val_"):
        return imagenet_val(file)
    return webdataset(file, [file])


def _sliced(
    kind: str, root: Path, found: Sequence[tuple[str, Slice]], labels: Sequence[int], names: tuple[str, ...],
    ignored: Sequence[str] = (),
) -> ImageSource:  # fmt: skip
    if not found:
        raise ValueError(f"images={root} has no images in it; give {KINDS}")
    files = sorted({part.file for _, part in found})
    versions = [*map(version_of, files), *((part.offset, part.size) for _, part in found)]
    return ImageSource(kind, root, [name for name, _ in found], labels, names,
                       lambda i: io.BytesIO(found[i][1].read()), versions, tuple(ignored))  # fmt: skip


def webdataset(root: Path, files: Sequence[Path]) -> ImageSource:
    """Tar files of <key>.<image suffix> with <key>.cls (a number or a name) or <key>.json (with one of LABEL_KEYS).

    A key ends at the first dot of the file name, and the rest is the field. Of several image files with one key, the
    one whose field is an image suffix alone is the image. Without any label, there are no classes. See `of_one_split`.
    """
    found: dict[tuple[Path, str, str], list[tuple[str, str, Slice]]] = {}  # of each key: name, field and place
    labels, (files, ignored) = {}, of_one_split(root, files)
    for file in files:
        for name, part in members(file):
            folder, _, base = name.rpartition("/")
            stem, _, kind = base.partition(".")
            key = (file, folder, stem)
            if f".{kind}".lower().endswith(EXTENSIONS):
                found.setdefault(key, []).append((f"{file.name}/{name}", kind, part))
            elif kind == "cls":
                labels[key] = part.read(MOST_TEXT).decode(errors="replace")
            elif kind == "json":
                labels.setdefault(key, _label_of(part.read(MOST_TEXT)))
            elif stem:
                ignored.append(skip_line(f"{file.name}/{name}", f"name ends in .{kind}"))
    images = []
    for (file, folder, stem), fields in found.items():
        alone = fields if len(fields) == 1 else [each for each in fields if f".{each[1]}".lower() in EXTENSIONS]
        if len(alone) != 1:
            key, kinds = f"{folder}/{stem}".lstrip("/"), ", ".join(f".{kind}" for _, kind, _ in fields)
            raise ValueError(f"images={root} has {len(fields)} images with the key {key!r} in {file.name}: {kinds}; "
                             "name the one to use KEY.png, or KEY.jpg")  # fmt: skip
        [(name, _, part)] = alone
        images.append((name, part))
        ignored += [skip_line(other, f"not the image of its key: .{kind}") for other, kind, _ in fields
                    if other != name]  # fmt: skip
    numbers, names = numbered([labels.get(key) for key in found], [name for name, _ in images], f"images={root}")
    return _sliced("a WebDataset", root, images, numbers, names, ignored)


def _label_of(data: bytes) -> object:
    try:
        stored = json.loads(data)
        return next((stored[key] for key in LABEL_KEYS if key in stored), None)
    except (ValueError, TypeError, RecursionError):
        return None


class DevKit(NamedTuple):
    """ILSVRC2012_devkit_t12.tar.gz: the class of each number, the classes in words, the validation images' numbers."""

    wnids: dict[int, str]
    words: dict[str, str]  # the first of the synonyms, made unique
    truth: list[int]

    @classmethod
    def beside(cls, file: Path) -> "DevKit | None":
        """The development kit in the same folder as `file`, or None."""
        path = file.with_name("ILSVRC2012_devkit_t12.tar.gz")
        if not path.is_file():
            return None
        try:
            parts = {Path(name).name: data for name, data in packed_files(path) if "/data/" in name}
            synsets = structures(parts["meta.mat"], "synsets", MOST)
            truth = [int(line) for line in parts["ILSVRC2012_validation_ground_truth.txt"].split()]
            leaves = [s for s in synsets if s["num_children"] == 0]
            wnids = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in leaves}
            first = {str(s["WNID"]): str(s["words"]).partition(",")[0] for s in leaves}
        except Exception as error:  # tarfile, zlib and struct raise all kinds of errors on damaged files
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); copy it again") from None
        many = {word for word, count in Counter(first.values()).items() if count > 1}  # there are two cranes
        words = {wnid: f"{word} ({wnid})" if word in many else word for wnid, word in first.items()}
        return cls(wnids, words, truth)


def imagenet_train(file: Path) -> ImageSource:
    """ILSVRC2012_img_train.tar: one tar file per class, n01440764.tar and so on; labels in the order of these names.

    With ILSVRC2012_devkit_t12.tar.gz beside it, the classes are named in words.
    """
    inner = sorted((name, part) for name, part in members(file) if name.endswith(".tar"))
    found, labels = [], []
    for label, (name, part) in enumerate(inner):
        images = [(f"{name}/{n}", p) for n, p in members(file, part.offset, part.offset + part.size)]
        found += images
        labels += [label] * len(images)
    kit = DevKit.beside(file)
    wnids = [name.removesuffix(".tar") for name, _ in inner]
    names = tuple(kit.words.get(wnid, wnid) if kit else wnid for wnid in wnids)
    return _sliced("ImageNet's training archive", file, found, labels, names)


def imagenet_val(file: Path) -> ImageSource:
    """ILSVRC2012_img_val.tar, with ILSVRC2012_devkit_t12.tar.gz beside it; labels as those of the training images."""
    kit = DevKit.beside(file)
    if not kit:
        raise ValueError(f"images={file} has no labels in it; put ILSVRC2012_devkit_t12.tar.gz, which has, beside it")
    found = sorted(members(file))
    if len(found) != len(kit.truth) or not set(kit.truth) <= kit.wnids.keys():
        raise ValueError(
            f"images={file} has {counted(len(found), 'image')}, but the devkit has labels for {len(kit.truth)}; "
            "copy both again"
        )
    ordered = sorted(kit.words)
    labels = [ordered.index(kit.wnids[number]) for number in kit.truth]
    return _sliced("ImageNet's validation archive", file, found, labels, tuple(kit.words[wnid] for wnid in ordered))
