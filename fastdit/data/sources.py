"""Where images come from: folders and lists of files here, archives in archives.py. Nothing is unpacked."""

import csv
import hashlib
import io
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from fastdit.data.images import EXTENSIONS, Opened, skip_line
from fastdit.data.manifest import SHARDS
from fastdit.data.order import permutation
from fastdit.errors import counted
from fastdit.files import read_bytes

LABEL_KEYS = ("label", "labels", "cls", "class", "class_id", "class_name", "fine_label")  # the first counts
WHOLE = re.compile(r"-?\d+(\.0*)?")  # 3.0, too: tables with missing values turn numbers into floats
SPLIT_NAMES = {"train", "training", "trainval", "val", "valid", "validation", "dev", "test"}
MAX_LIST = 1 << 30  # bytes of a list
MAX_CLASSES = 100_000  # a larger number in place of a label is a mistake
OUTPUTS = {  # of fastdit's commands, by the files that show them
    "latents": SHARDS,
    "a run": ("config.yaml", "checkpoints"),
    "samples with their grid": ("sampling.json", "grid.png"),
}
KINDS = ("a folder of class folders, a folder of images, a CSV or JSONL list of path and label, a WebDataset, "
         "ImageNet's or CIFAR's archive, or Parquet files")  # fmt: skip


@dataclass(frozen=True)
class ImageSource:
    """Images and their labels. `open(i)` returns what `read_image` takes; threads call it.

    `labels` are indices into `class_names`. Without class names they are all 0 and mean nothing.
    `ignored`: path, tab, reason of every other file, hidden ones excepted.
    """

    kind: str
    root: Path
    paths: Sequence[str]  # names for messages; of files: relative to root
    labels: Sequence[int]
    class_names: tuple[str, ...]
    open: Callable[[int], Opened] = field(compare=False)
    versions: Sequence[tuple[int, int]] = ()  # (size in bytes, time of the last change in ns) of what is read
    ignored: tuple[str, ...] = ()
    chunks: Sequence[range] = ()  # images that are best read together; () if each is read on its own

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def order(self) -> list[int]:
        """The images shuffled, so that each shard mixes the classes; if there are chunks, they and what each holds."""
        chunks = self.chunks or [range(len(self))]
        mixed = permutation(0, 0, len(chunks)).tolist() if self.chunks else [0]
        return [chunks[c][i] for c in mixed for i in permutation(0, c, len(chunks[c])).tolist()]

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the names, labels, sizes and times: it changes when an image is added, removed or edited."""
        digest = hashlib.sha256(repr((self.kind, self.class_names, self.ignored)).encode(errors="backslashreplace"))
        for part in (self.paths, self.labels, self.versions):
            digest.update("\n".join(map(str, part)).encode(errors="backslashreplace"))
        return digest.hexdigest()

    @cached_property
    def contents(self) -> str:
        """SHA-256 of the names and labels: unlike `identity`, it stays when the files are copied elsewhere."""
        listed = "\n".join(f"{label} {path}" for path, label in zip(self.paths, self.labels, strict=True))
        return hashlib.sha256(listed.encode(errors="backslashreplace")).hexdigest()

    @cached_property
    def listing(self) -> str:
        """SHA-256 of the names, labels and file sizes. Different images with the same names rarely share it."""
        sizes = [version and version[0] for version in self.versions]
        return hashlib.sha256(f"{self.contents} {sizes}".encode()).hexdigest()

    def changed_after(self, file: Path) -> int:
        """The number of its files that were changed after another one was."""
        made = file.stat().st_mtime_ns
        return sum(version[1] > made for version in self.versions if version)


def list_images(root: str | Path) -> ImageSource:
    """root/<class>/**/<image>, with classes and paths sorted, or the images of a folder without subfolders.

    The latter have no classes. Hidden files and folders are ignored. Symbolic links are followed, but no folder is
    visited twice. Raises a ValueError if the folder is missing, empty or cannot be read, if there are images beside
    class subfolders, if the subfolders are splits, or if a class subfolder has no images (it would silently shift the
    labels of those after it).
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"images={root} does not exist; give {KINDS}")
    try:
        entries = sorted(e.name for e in os.scandir(root) if not e.name.startswith("."))
    except OSError as error:
        raise _unreadable(error) from error
    classes = [name for name in entries if (root / name).is_dir()]
    loose = [name for name in entries if name.lower().endswith(EXTENSIONS) and name not in classes]
    if loose and classes:
        raise ValueError(
            f"images={root} has {counted(len(loose), 'image')} beside its subfolders (the first is {loose[0]!r}); "
            "move them into one subfolder per class, or all images into the folder itself to train without classes"
        )
    if not classes and not loose:
        raise ValueError(f"images={root} is empty; it needs images, or one subfolder of images per class")
    for name in classes:
        for what, files in OUTPUTS.items():
            if all((root / name / file).exists() for file in files):
                raise ValueError(f"images={root} has a subfolder {name!r} that holds {what}, not the "
                                 "images of a class; move it elsewhere")  # fmt: skip
    found: list[tuple[str, int, tuple[int, int]]] = []  # path, label, version
    ignored, visited = [], set()
    for label, name in enumerate(classes or ["."]):
        images, others = _files_below(root, name, visited)
        ignored += others
        if not images:
            raise ValueError(
                f"images={root} has a class subfolder {name!r} without images; remove it, or add {'/'.join(EXTENSIONS)}"
            )
        found += [(path, label, version) for path, version in images]
    nested = any(path.count("/") > 1 for path, *_ in found)
    if classes and SPLIT_NAMES.issuperset(map(str.lower, classes)) and (nested or len(classes) > 1):
        raise ValueError(f"images={root} has the splits {', '.join(classes)}, not classes; give one of them, such as "
                         f"{root / classes[0]}")  # fmt: skip
    paths, labels, versions = zip(*found, strict=True)
    return ImageSource(
        "class folders" if classes else "a folder of images",
        root,
        paths,
        labels,
        tuple(classes),
        lambda i: root / paths[i],
        versions,
        tuple(ignored),
    )


def remarks(source: ImageSource) -> list[str]:
    """What a user should know about images before they are extracted, one line each."""
    classes = counted(len(source.class_names), "class", "classes") if source.class_names else "no classes"
    lines = [f"images={source.root}: {source.kind}, {counted(len(source), 'image')}, {classes}"]
    if source.ignored:
        kinds = Counter(line.split("\t")[1] for line in source.ignored)
        counts = ", ".join(f"{count} x {reason}" for reason, count in kinds.most_common(5))
        lines.append(f"ignored {counted(len(source.ignored), 'file')} ({counts}); see skipped.txt")
    names = source.class_names
    listed = {"metadata.csv", "metadata.jsonl"} & {line.partition("\t")[0] for line in source.ignored}
    if listed and not names:  # as Hugging Face's ImageFolder has them
        lines.append(f"for labels in it, use --images {source.root}/{min(listed)}")
    if empty := sorted(set(range(len(names))) - set(source.labels)):
        lines.append(f"{len(empty)} of {len(names)} classes have no images (the first is {names[empty[0]]!r})")
    if all(name.isdigit() for name in names) and [*map(int, names)] != sorted(map(int, names)):
        order = ", ".join(names[:4])
        lines.append(
            f"class folders are sorted as text: label 0, 1, 2, ... are {order}, ...; pad them with zeros to 00, 01"
        )
    return lines


def _unreadable(error: OSError) -> ValueError:
    return ValueError(f"{error.filename} cannot be read ({error.strerror}); make it readable, or remove it")


def version_of(path: Path) -> tuple[int, int] | None:
    """(size, time of the last change in ns) of a regular file; None for anything else: opening a pipe would block."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def _files_below(root: Path, name: str, visited: set[tuple[int, int]]) -> tuple[list, list[str]]:
    """(path, version) of the images below root/name, and the ignored files with their reasons, sorted.

    `visited`: the folders seen so far.
    """

    def stop(error: OSError) -> None:
        raise _unreadable(error)

    found, ignored = [], []
    for folder, subfolders, files in os.walk(root / name, followlinks=True, onerror=stop):
        status = os.stat(folder)
        below = Path(folder).relative_to(root)
        if (status.st_dev, status.st_ino) in visited:  # a link to a folder above, or to one of another class
            subfolders.clear()
            ignored.append(skip_line(below.as_posix(), "a second path to a folder that was already read"))
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        for file in sorted(files):
            path = (below / file).as_posix()
            if file.startswith("."):
                continue
            if not (version := version_of(root / path)):
                ignored.append(skip_line(path, "not a regular file"))
            elif file.lower().endswith(EXTENSIONS):
                found.append((path, version))
            else:
                ignored.append(skip_line(path, f"name ends in {Path(file).suffix.lower() or 'no suffix'}"))
    return sorted(found), ignored


def list_rows(file: Path) -> ImageSource:
    """The images that a CSV or JSONL file lists: `path` (or `file_name`), relative to it, and a label in each row.

    A label is a class name or number, in the first of LABEL_KEYS that a row has. Without any, there are no classes. Of
    several splits in a column `split`, train is read.
    """
    try:
        text = read_bytes(file, MAX_LIST).decode("utf-8-sig")  # spreadsheets put a mark at the beginning
        if file.suffix.lower() == ".csv":
            table = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
            table.fieldnames = [name.strip().lower() for name in table.fieldnames or ()]
            rows = list(table)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError, csv.Error) as error:  # JSONDecodeError, UnicodeDecodeError
        raise ValueError(f"images={file} cannot be read ({error}); write path and label as UTF-8 text") from None
    except OSError as error:
        raise _unreadable(error) from error
    key = next((key for key in ("path", "file_name") if rows and isinstance(rows[0], dict) and key in rows[0]), None)
    if key is None:
        first = "the first line `path,label`" if file.suffix.lower() == ".csv" else '{"path": ..., "label": ...} lines'
        raise ValueError(f"images={file} has no rows with a path; it needs {first}")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get(key), str) or not row[key]:
            raise ValueError(f"images={file} has no {key} in row {number + 1}; complete it, or remove the row")
    rows, ignored = _rows_of_one_split(file, rows, key)
    paths = [row[key] for row in rows]
    label = next((key for key in LABEL_KEYS if any(key in row for row in rows)), None)
    labels, names = numbered([row.get(label) for row in rows], paths, f"images={file}")
    root = file.parent

    def opened(i: int) -> Path:
        if not version_of(root / paths[i]):
            raise ValueError(f"{root / paths[i]} is not a file")
        return root / paths[i]

    versions = [version_of(file), *(version_of(root / path) for path in paths)]
    return ImageSource(f"a {file.suffix[1:].upper()} list", file, paths, labels, names, opened, versions,
                       ignored)  # fmt: skip


def _rows_of_one_split(file: Path, rows: Sequence[dict], key: str) -> tuple[Sequence[dict], tuple[str, ...]]:
    """The rows whose column `split` says train, and a line of skipped.txt for each other one; see `of_one_split`."""
    splits = [str(row.get("split")).strip().lower() for row in rows]
    if len({*splits}) < 2 or not SPLIT_NAMES.issuperset(splits):
        return rows, ()
    if "train" not in splits:
        raise ValueError(f"images={file} has rows of the splits {', '.join(sorted({*splits}))}; leave those of one")
    pairs = [*zip(rows, splits, strict=True)]
    return [row for row, split in pairs if split == "train"], tuple(
        skip_line(row[key], "not of the training split") for row, split in pairs if split != "train")  # fmt: skip


def of_one_split(root: Path, files: Sequence[Path]) -> tuple[Sequence[Path], list[str]]:
    """The files of the split train, such as train-00000-of-00002.parquet, and a line of skipped.txt for each other one.

    All files if their names tell no splits. ValueError if there are several splits, and not one is for training.
    """
    splits = {file: re.sub(r"([-_.]?\d+(-of-\d+)?(-[0-9a-f]+)?)$", "", file.stem).lower() for file in files}
    words = {split: {*re.split("[^a-z]+", split)} for split in splits.values()}
    train = ["train"] if "train" in words else [split for split in words if words[split] & {"train", "training"}]
    if len(train) == 1:
        ignored = [skip_line(file.name, "not of the training split") for file in files if splits[file] != train[0]]
        return [file for file in files if splits[file] == train[0]], ignored
    if len(words) > 1 and any(each & SPLIT_NAMES for each in words.values()):
        raise ValueError(f"images={root} has files of the splits {', '.join(words)}; give a folder with the files "
                         "of one, or a single file")  # fmt: skip
    return files, []


def numbered(values: Iterable[object], paths: Sequence[str], where: str) -> tuple[list[int], tuple[str, ...]]:
    """Labels and class names from numbers, which stay as they are, or from names, which are sorted.

    If all are missing (None or ""), there are no classes. ValueError if only some are, or for values of another type.
    """
    texts = []
    for value, path in zip(values, paths, strict=True):
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
            raise ValueError(f"{where} has label {value!r} for {path!r}; write a name or a whole number")
        texts.append("" if value is None else str(value).strip())
    missing = texts.count("")
    if missing == len(texts):
        return [0] * len(texts), ()
    if missing:
        raise ValueError(
            f"{where} has no label for {missing} of {len(texts)} images (the first is {paths[texts.index('')]!r}); "
            "a label is a name or a number; give all or none"
        )
    if all(WHOLE.fullmatch(text) for text in texts):
        texts = [text.partition(".")[0] for text in texts]
        if negative := next((text for text in texts if text.startswith("-")), None):
            raise ValueError(f"{where} has label {negative}; numbers must be 0 or more, or write names")
        most = max(map(len, texts))
        labels = [int(text) for text in texts] if most < 1000 else [MAX_CLASSES]  # Python reads up to 4,300 digits
        if max(labels) >= MAX_CLASSES:
            label = max(labels) if most < 1000 else f"of {most} digits"
            raise ValueError(f"{where} has label {label}; numbers must be below {MAX_CLASSES}, or write names")
        return labels, tuple(map(str, range(max(labels) + 1)))
    names = sorted(set(texts))
    places = {name: label for label, name in enumerate(names)}
    return [places[text] for text in texts], tuple(names)
