"""Folders of latents in object stores and on web servers, read through fsspec into a folder of this machine.

<cache>/<hash of the URL>/manifest.json   fetched at each start
<cache>/<SHA-256>                         an index or a shard, fetched when it is first needed, under what it contains
<cache>/.lock                             held while room is made

A file appears under its SHA-256 once it is complete and checked. The processes that share a cache fetch each file once.
With a limit, the files that were opened least recently are deleted before another is fetched. A process locks the files
that it has open, and these are not deleted: as long as they do not fit, the cache is larger than the limit.
"""

import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from fastdit.errors import is_no_space, make_folder
from fastdit.files import JSON_BYTES, replacing
from fastdit.schema import Cache

PROTOCOLS = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "https": "aiohttp", "http": "aiohttp",
             "file": "", "memory": ""}  # and the packages that they need  # fmt: skip
CHUNK = 1 << 22  # bytes
WAITS_S = (1, 4)  # before a store that failed is asked again
TIMEOUT_S = 60  # of a web server that sends nothing; the packages of object stores have their own
STORED = re.compile(r"[0-9a-f]{64}(\.partial)?")  # the only files that are deleted
Found = TypeVar("Found")


NO_CACHE = Cache()


class Failed(ValueError):
    """What may succeed when it is tried again."""


class Missing(ValueError):
    """A file that the store does not have."""


def is_remote(folder: object) -> bool:
    """Whether data.shards is a URL, or a command for a shell, which is refused when it is opened."""
    return "://" in str(folder) or str(folder).startswith("pipe:")


def check_local(path: object, what: str) -> None:
    """Raises a ValueError for a URL."""
    if is_remote(path):
        raise ValueError(f"{what} reads folders of this machine, not {path}; copy it here first")


def fetch_manifest(url: str, cache: Cache) -> Path:
    """Fetch <url>/manifest.json; returns the folder that it is in. ValueError that names the key."""
    protocol, found, rest = str(url).partition("://")
    if not found or "::" in url or protocol not in PROTOCOLS:
        known = ", ".join(f"{name}://" for name in PROTOCOLS)
        raise ValueError(f"data.shards={url} cannot be read; use a local folder, or one of {known}")
    login, _, _ = rest.partition("/")[0].rpartition("@")
    if ":" in login:
        raise ValueError(f"data.shards={url.replace(login, '***')} has a password, which config.yaml and the report "
                         "would show; leave it out and put it into ~/.netrc")  # fmt: skip
    if "?" in url or "#" in url:
        raise ValueError(f"data.shards={url} has a query, which the names of its files cannot follow; leave it out")
    if not cache.folder:
        raise ValueError(f"data.shards={url} needs a folder for its files; set data.cache=FOLDER, or --cache FOLDER")
    folder = Path(cache.folder) / hashlib.sha256(url.encode()).hexdigest()[:16]
    make_folder(folder, "data.cache")

    def read() -> bytes:
        with _opened(url, "manifest.json") as source:
            return _read(source, JSON_BYTES + 1, f"{url}/manifest.json")

    data = _tried(read)
    if len(data) > JSON_BYTES:
        raise ValueError(f"{url}/manifest.json has more than the {JSON_BYTES} bytes that are read")
    new = folder / f"manifest.{os.getpid()}"  # of this process: others may fetch it, too
    with replacing(new) as file:
        file.write(data)
    return Path(new.replace(folder / "manifest.json")).parent


def opened(url: str, name: str, size: int, sha256: str, cache: Cache) -> int:
    """A descriptor of the file of `fetched`, which is not deleted as long as it is open."""
    while True:
        path = fetched(url, name, size, sha256, cache)
        with suppress(FileNotFoundError):  # it was deleted meanwhile
            descriptor = os.open(path, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if _is(descriptor, path):
                with suppress(OSError):  # another user's
                    os.utime(descriptor)
                return descriptor
            os.close(descriptor)


def fetched(url: str, name: str, size: int, sha256: str, cache: Cache) -> Path:
    """The file of the cache with the contents of <url>/<name>, which is fetched unless it is there.

    `size` is the most bytes that are read. ValueError where the store fails, the SHA-256 differs or the disk is full.
    """
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"{url}/manifest.json names {name} without a SHA-256; extract the latents again")
    path, partial = Path(cache.folder) / sha256, Path(cache.folder) / f"{sha256}.partial"
    while not path.is_file():
        with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # which the end of a process releases
            if not _is(file.fileno(), partial):  # another process has completed or deleted it meanwhile
                continue
            if path.is_file():
                partial.unlink()
            else:
                try:
                    _make_room(file, size, f"{url}/{name}", cache)
                    _tried(lambda file=file: _copy(url, name, file, size, sha256))
                    file.flush()
                    os.fsync(file.fileno())
                except OSError as error:
                    full = f"; {cache.folder} needs more space" if is_no_space(error) else ""
                    raise ValueError(f"{partial} cannot be written ({error.strerror}){full}") from None
                partial.replace(path)
    return path


def _make_room(file: BinaryIO, size: int, name: str, cache: Cache) -> None:
    """Gives an empty file its size, after deleting others for which the cache has no room then."""
    folder = Path(cache.folder)
    if size > cache.most:
        raise ValueError(f"data.cache_gib={cache.gib:g} is less than the {_gib(size)} GiB of {name}; use more")
    file.truncate(0)
    with _locked(folder):
        found = []
        for path in folder.iterdir():
            with suppress(FileNotFoundError):
                if STORED.fullmatch(path.name):
                    found.append((path.lstat().st_mtime_ns, path.lstat().st_size, path))
        over = max(sum(taken for _, taken, _ in found) + size - cache.most, size - shutil.disk_usage(folder).free)
        for _, taken, path in sorted(found) if cache.gib else ():
            if over > 0 and _deleted(path):
                over -= taken
        free = shutil.disk_usage(folder).free
        if free < size:
            raise ValueError(f"data.cache={folder} has {_gib(free)} GiB free, but {name} needs {_gib(size)}; free "
                             "some, or set a lower data.cache_gib")  # fmt: skip
        file.truncate(size)  # which counts for other processes from now on


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g}"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _deleted(path: Path) -> bool:
    """Deletes a file unless a process reads or writes it."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)  # to write, without which NFS gives no such lock
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            return True
        finally:
            os.close(descriptor)
    return False


def _is(descriptor: int, path: Path) -> bool:
    """Whether the path still leads to the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _copy(url: str, name: str, file: BinaryIO, size: int, sha256: str) -> None:
    """Copies at most a chunk more than `size` bytes; ValueError if they are others, and then the file is empty."""
    digest = hashlib.sha256()
    file.seek(0)
    with _opened(url, name) as source:
        while file.tell() <= size and (data := _read(source, CHUNK, f"{url}/{name}")):
            digest.update(data)
            file.write(data)
    file.truncate()
    if digest.hexdigest() != sha256:
        file.truncate(0)
        raise Failed(f"{url}/{name} does not have the SHA-256 in the manifest; upload it again")


def _tried(read: Callable[[], Found]) -> Found:
    for wait in WAITS_S:
        try:
            return read()
        except Failed:
            time.sleep(wait)
    return read()


def _read(source: BinaryIO, most: int, name: str) -> bytes:
    try:
        return source.read(most)
    except Exception as error:  # each store has its own kinds
        raise _unreadable(name, error) from None


def _unreadable(name: str, error: Exception) -> ValueError:
    if isinstance(error, FileNotFoundError):
        return Missing(f"{name} cannot be read (it is not there); check data.shards")
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
    kind = ValueError if isinstance(error, PermissionError) else Failed
    return kind(f"{name} cannot be read ({text}); check data.shards and the access to it")


def _opened(url: str, name: str) -> BinaryIO:
    """<url>/<name>, open to read; ValueError that says why it is not."""
    import fsspec  # takes a while, and few runs need it

    url, protocol = url.rstrip("/"), url.partition("://")[0]
    try:
        if not protocol.startswith("http"):
            system, path = fsspec.core.url_to_fs(f"{url}/{name}")
            return system.open(path, "rb")
        import aiohttp

        # trust_env: passwords of ~/.netrc, and the proxies of HTTP_PROXY and HTTPS_PROXY
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT_S, sock_read=TIMEOUT_S)
        system, path = fsspec.core.url_to_fs(f"{url}/{name}", client_kwargs={"timeout": timeout, "trust_env": True})
        return system.open(path, "rb", block_size=0, size=1)  # one request: nothing asks for the size first
    except ImportError as error:
        package = PROTOCOLS[protocol]
        raise ValueError(f"data.shards={url} needs a package; pip install {package} ({error})") from None
    except Exception as error:
        raise _unreadable(f"{url}/{name}", error) from None
