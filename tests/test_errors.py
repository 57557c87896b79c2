"""A user's mistake is one line and exit code 2; other errors keep their traceback."""

import errno

import pytest

from fastdit.errors import friendly_exit


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


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("FASTDIT_DEBUG", "1")
    with pytest.raises(ValueError, match="lr"):
        raising(ValueError("lr"))()
