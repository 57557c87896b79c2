"""Folders of latents in object stores and on web servers, read through fsspec into a folder of this machine.

<cache>/<hash of the URL>/manifest.json   fetched at each start
<cache>/<SHA-256>                         an index or a shard, fetched when it is first needed, under what it contains

A file appears under its SHA-256 once it is complete and checked. The processes that share a cache fetch each file once.
Nothing is deleted: the cache may grow to the size of the latents.
"""

import fcntl
import hashlib
import os
import re
from pathlib import Path
from typing import BinaryIO

from fastdit.errors import make_folder
from fastdit.files import JSON_BYTES, replacing

PROTOCOLS = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "https": "aiohttp", "file": "", "memory": ""}  # and packages
CHUNK = 1 << 22  # bytes


def is_remote(folder: object) -> bool:
    """Whether data.shards is a URL, or a command for a shell, which is refused when it is opened."""
    return "://" in str(folder) or str(folder).startswith("pipe:")


def fetch_manifest(url: str, cache: str | Path) -> Path:
    """Fetch <url>/manifest.json; returns the folder that it is in. ValueError that names the key."""
    protocol, found, _ = str(url).partition("://")
    if not found or "::" in url or protocol not in PROTOCOLS:
        known = ", ".join(f"{name}://" for name in PROTOCOLS)
        raise ValueError(f"data.shards={url} cannot be read; use a local folder, or one of {known}")
    if not cache:
        raise ValueError(f"data.shards={url} needs a folder for its files; set data.cache=FOLDER")
    folder = Path(cache) / hashlib.sha256(url.encode()).hexdigest()[:16]
    make_folder(folder, "data.cache")
    with _opened(url, "manifest.json") as source:
        data = _read(source, JSON_BYTES + 1, f"{url}/manifest.json")
    if len(data) > JSON_BYTES:
        raise ValueError(f"{url}/manifest.json has more than the {JSON_BYTES} bytes that are read")
    new = folder / f"manifest.{os.getpid()}"  # of this process: others may fetch it, too
    with replacing(new) as file:
        file.write(data)
    return Path(new.replace(folder / "manifest.json")).parent


def fetched(url: str, name: str, size: int, sha256: str, cache: Path) -> Path:
    """The file of the cache with the contents of <url>/<name>, which is fetched unless it is there.

    `size` is the most bytes that are read. ValueError where the store fails, or the SHA-256 is another.
    """
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"{url}/manifest.json names {name} without a SHA-256; extract the latents again")
    path, partial = cache / sha256, cache / f"{sha256}.partial"
    while not path.is_file():
        with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # which the end of a process releases
            if path.is_file():  # another process has fetched it meanwhile
                partial.unlink(missing_ok=True)
            elif _is(file, partial):
                file.truncate()
                if _copy(url, name, file, size) != sha256:
                    file.truncate(0)
                    raise ValueError(f"{url}/{name} does not have the SHA-256 in the manifest; upload it again")
                file.flush()
                os.fsync(file.fileno())
                partial.replace(path)
    return path


def _is(file: BinaryIO, path: Path) -> bool:
    """Whether the path still leads to the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _copy(url: str, name: str, file: BinaryIO, size: int) -> str:
    """Copies at most a chunk more than `size` bytes; the SHA-256 of what was read."""
    digest = hashlib.sha256()
    with _opened(url, name) as source:
        while file.tell() <= size and (data := _read(source, CHUNK, f"{url}/{name}")):
            digest.update(data)
            file.write(data)
    return digest.hexdigest()


def _read(source: BinaryIO, most: int, name: str) -> bytes:
    try:
        return source.read(most)
    except Exception as error:  # each store has its own kinds
        raise _unreadable(name, error) from None


def _unreadable(name: str, error: Exception) -> ValueError:
    text = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{name} cannot be read ({text}); check data.shards and the access to it")


def _opened(url: str, name: str) -> BinaryIO:
    """<url>/<name>, open to read; ValueError that says why it is not."""
    import fsspec  # takes a while, and few runs need it

    url = url.rstrip("/")
    try:
        system, path = fsspec.core.url_to_fs(f"{url}/{name}")
        return system.open(path, "rb")
    except ImportError as error:
        package = PROTOCOLS[url.partition("://")[0]]
        raise ValueError(f"data.shards={url} needs a package; pip install {package} ({error})") from None
    except Exception as error:
        raise _unreadable(f"{url}/{name}", error) from None
