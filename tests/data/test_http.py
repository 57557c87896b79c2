"""Shards on a web server: read as local ones; whatever the server does, there is one line or the right bytes."""

import base64
import shutil
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from fsspec.registry import _registry

from fastdit.cli import main
from fastdit.data import remote
from fastdit.data.manifest import Manifest
from fastdit.data.remote import Cache
from helpers.sets import write
from helpers.shards import take

pytestmark = pytest.mark.usefixtures("one_thread")


class Server(ThreadingHTTPServer):
    """Serves a folder. `faults` are what it does at the next requests for shard-00001.tar."""

    daemon_threads = True

    def __init__(self, folder: Path):
        self.folder, self.faults, self.asked, self.over, self.login = folder, [], [], threading.Event(), ""
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/b"


class Handler(SimpleHTTPRequestHandler):
    def __init__(self, *arguments):
        super().__init__(*arguments, directory=str(arguments[2].folder))

    def log_message(self, *_):
        """Nothing."""

    def do_GET(self):
        self.server.asked.append((self.command, self.path))
        if self.server.login and self.headers.get("Authorization") != self.server.login:
            return self.send_error(401)
        fault = self.server.faults.pop(0) if self.path.endswith("00001.tar") and self.server.faults else None
        if isinstance(fault, int):
            return self.send_error(fault)
        if fault is None:
            return super().do_GET()
        data = (self.server.folder / self.path.lstrip("/")).read_bytes()
        self.send_response(200)
        if fault != "cut without a length":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        if fault == "hangs":
            self.server.over.wait(60)
        self.close_connection = True


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("served")
    write(root / "b", 40, 2000)
    return root


@pytest.fixture
def server(folder, monkeypatch) -> Server:
    monkeypatch.setattr(remote, "WAITS_S", (0, 0))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server(folder) as made:
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        yield made
        made.over.set()
        made.shutdown()


def content(manifest: Manifest, number: int) -> bytes:
    with open(manifest.open_shard(number), "rb") as file:
        return file.read()


def test_batches_are_those_of_the_local_folder_and_each_file_is_asked_for_once(server, tmp_path):
    there = take(Manifest.load(server.url, Cache(tmp_path)), 6, global_batch=7, seed=3)
    local = take(Manifest.load(server.folder / "b"), 6, global_batch=7, seed=3)
    assert all(torch.equal(a.moments, b.moments) for a, b in zip(there, local, strict=True))
    names = ["index.npy", "manifest.json", *(f"shard-0000{i}.tar" for i in range(4))]
    assert sorted(server.asked) == [("GET", f"/b/{name}") for name in names]


def test_a_server_that_sends_nothing_more_is_left(server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "WAITS_S", (0,))
    manifest = Manifest.load(server.url, Cache(tmp_path))
    monkeypatch.setattr(remote, "TIMEOUT_S", 1)
    server.faults = ["hangs"] * 2
    with pytest.raises(ValueError, match=r"shard-00001.tar cannot be read \(.*[Tt]imeout.*\); check data.shards"):
        content(manifest, 1)
    assert content(manifest, 1) == (server.folder / "b/shard-00001.tar").read_bytes()


@pytest.mark.parametrize("fault", [500, 503, 429, "cut", "cut without a length"])
def test_a_server_that_fails_is_asked_three_times(server, tmp_path, fault):
    manifest = Manifest.load(server.url, Cache(tmp_path))
    server.faults = [fault] * 2
    assert content(manifest, 1) == (server.folder / "b/shard-00001.tar").read_bytes()
    shutil.rmtree(tmp_path)
    manifest = Manifest.load(server.url, Cache(tmp_path))
    server.faults, server.asked = [fault] * 9, []
    with pytest.raises(ValueError, match="shard-00001.tar (cannot be read|does not have the SHA-256)") as error:
        content(manifest, 1)
    assert len(server.asked) == 3 and "\n" not in str(error.value) and len(str(error.value)) < 300
    assert [path.name for path in tmp_path.iterdir() if path.is_file() and path.suffix != ".partial"] == [".lock"]


def test_a_password_comes_from_netrc(server, tmp_path, monkeypatch):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret")
    server.login = "Basic " + base64.b64encode(b"me:secret").decode()
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"manifest.json cannot be read \(.*401"):
        Manifest.load(server.url, Cache(tmp_path))
    monkeypatch.setenv("NETRC", str(netrc))
    local = (server.folder / "b/shard-00001.tar").read_bytes()
    assert content(Manifest.load(server.url, Cache(tmp_path)), 1) == local


@pytest.mark.parametrize("status", [404, 410, 403])
def test_a_file_that_is_not_there_is_named(server, tmp_path, status):
    manifest = Manifest.load(server.url, Cache(tmp_path))
    server.faults = [status] * 3
    with pytest.raises(ValueError, match="shard-00001.tar cannot be read .*; check data.shards") as error:
        content(manifest, 1)
    assert "\n" not in str(error.value) and str(status) in str(error.value) or status == 404
    with pytest.raises(ValueError, match=r"/b/nowhere/manifest.json cannot be read \(it is not there\); check"):
        Manifest.load(f"{server.url}/nowhere", Cache(tmp_path))


def test_a_server_that_is_not_there_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(remote, "WAITS_S", ())
    with pytest.raises(SystemExit):
        main(["shards", "stats", "http://127.0.0.1:9/b", "--cache", str(tmp_path)])
    assert "error: http://127.0.0.1:9/b/manifest.json cannot be read (" in capsys.readouterr().err


@pytest.mark.parametrize(("url", "package"), [("s3://b/x", "s3fs"), ("gs://b/x", "gcsfs"), ("az://b/x", "adlfs"),
                                              ("http://b/x", "aiohttp"), ("https://b/x", "aiohttp")])  # fmt: skip
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, url, package):
    monkeypatch.setitem(sys.modules, package, None)  # an import of it fails
    for name in ("http", "https", "s3", "gs", "az"):
        monkeypatch.delitem(_registry, name, raising=False)
    with pytest.raises(ValueError, match=f"data.shards={url} needs a package; pip install {package}") as error:
        Manifest.load(url, Cache(tmp_path))
    assert "\n" not in str(error.value)
