"""The command, called in the process of the test."""

import pytest

from fastdit.cli import main


def mistake(capsys: pytest.CaptureFixture, *argv: object) -> str:
    """The one line with which the command refuses these arguments."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main([*map(str, argv)])
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    return said.err
