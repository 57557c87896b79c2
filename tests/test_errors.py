"""A user's mistake is one line and exit code 2; other errors keep their traceback."""

import errno
import os
import subprocess
import sys

import pytest

from fastdit.errors import counted, friendly_exit, output_file
from fastdit.files import replace_text
from helpers import ROOT
from helpers.runs import file_size_limit


def raising(error: BaseException):
    @friendly_exit()
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("lr=x is no number;\n  use 1e-4"), "error: lr=x is no number; use 1e-4"),
        (OSError(errno.ENOSPC, "No space left", "/a/b"), "error: no space left for /a/b; free some or write elsewhere"),
        (MemoryError("Unable to allocate"), "error: this machine has too little memory (Unable to allocate)"),
        (OSError(errno.EFBIG, "File too large", "/a/b"),
         "error: /a/b would exceed the limit on file sizes; raise it (ulimit -f)"),
        (OSError(errno.ENOSPC, "No space left", "/from", None, "/to"),
         "error: no space left for /to; free some or write elsewhere"),
        (OSError(errno.EDQUOT, "Quota"), "error: no space left for the output; free some or write elsewhere"),
    ],
)
def test_mistakes_are_one_line(capsys, monkeypatch, error, line):
    monkeypatch.delenv("FASTDIT_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stop:
        raising(error)()
    assert stop.value.code == 2
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), OSError(errno.EIO, "I/O error"), RuntimeError("x"), KeyboardInterrupt(),
     BrokenPipeError(errno.EPIPE, "not of the output")],
)
def test_other_failures_pass_through(error):
    with pytest.raises(type(error)):
        raising(error)()


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("line, code, said", [("configs", 141, ""), ("no-such-command", 2, "error: ")])
def test_a_closed_pipe_ends_a_command_quietly(line, code, said, unbuffered):
    """As in `fastdit configs | head -1`. A mistake is still told."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "fastdit.cli", line], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE,
                          env=os.environ | {"PYTHONUNBUFFERED": unbuffered}, text=True)  # fmt: skip
    os.close(writer)
    assert done.returncode == code and done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)


def test_a_text_file_that_cannot_be_written_is_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    replace_text(path, "old")
    with file_size_limit(100), pytest.raises(OSError, match=f"File too large: '{path}'"):
        replace_text(path, "new" * 100)
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("FASTDIT_DEBUG", "1")
    with pytest.raises(ValueError, match="lr"):
        raising(ValueError("lr"))()


def test_a_number_has_the_singular_only_at_1():
    assert [counted(n, "shard") for n in (0, 1, 2, 1234)] == ["0 shards", "1 shard", "2 shards", "1,234 shards"]
    assert [counted(n, "class", "classes") for n in (1, 3)] == ["1 class", "3 classes"]
    assert [counted(n, "epoch", spec=".3g") for n in (1.0001, 1.5, 0.5)] == ["1 epoch", "1.5 epochs", "0.5 epochs"]


def test_an_output_file_has_its_suffix_and_a_folder(tmp_path):
    assert output_file(tmp_path / "new" / "a" / "x.PNG", "--out", ".png", new=True) == tmp_path / "new/a/x.PNG"
    assert (tmp_path / "new/a").is_dir()
    (tmp_path / "x.png").touch()
    (tmp_path / "y.png").mkdir()
    assert output_file(tmp_path / "x.png", "--out", ".png") == tmp_path / "x.png"
    for name, words in (
        ("x.jpg", "x.jpg must be a file that ends in .png"),
        ("y.png", "y.png must be a file that ends in .png"),
        ("x.png", "x.png exists; choose another name"),
        ("x.png/z.png", "x.png cannot be created"),
    ):
        with pytest.raises(ValueError, match=f"--out=.*{words}"):
            output_file(tmp_path / name, "--out", ".png", new=True)
