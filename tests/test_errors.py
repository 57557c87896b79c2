"""A user's mistake is one line and exit code 2; other errors keep their traceback."""

import errno

import pytest

from fastdit.errors import friendly_exit
from fastdit.files import replace_text
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
    "error", [KeyError("x"), OSError(errno.EIO, "I/O error"), RuntimeError("x"), KeyboardInterrupt()]
)
def test_other_failures_pass_through(error):
    with pytest.raises(type(error)):
        raising(error)()


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
