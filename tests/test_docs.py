"""What the pages tell users to type exists: commands, options, config keys and their values, files and headings."""

import re
import shlex
from functools import wraps

import pytest

from fastdit import cli
from fastdit.autoencoder.config import AutoencoderConfig
from fastdit.commands import COMMANDS
from fastdit.config import config_from, load_config, shipped_names
from fastdit.diffusion.objectives import OBJECTIVES
from fastdit.diffusion.samplers import SAMPLERS
from fastdit.registry import bind, build
from helpers import ROOT

PAGES = [ROOT / "docs" / f"{name}.md" for name in ("autoencoder", "from", "images")]
SECTIONS = "data|model|objective|training|sampling|loss|discriminator"
OVERRIDE = re.compile(rf"(seed|run_dir|objective|({SECTIONS})\.[\w.]+)=\S")


def snippets(text: str) -> list[str]:
    """Lines of code blocks and code spans, of tables only the second column: the first has others' commands."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
    rest = re.sub(r"^```\n.*?^```", "", text, flags=re.M | re.S)
    lines = [line.split("|")[2] if line.startswith("|") else line for line in rest.splitlines()]
    return [line for block in blocks for line in block.replace("\\\n", "").splitlines()] + [
        span for line in lines for span in re.findall(r"`([^`]+)`", line)
    ]


@pytest.fixture
def parsed(monkeypatch):
    """Commands that only parse their arguments; the list of them."""
    calls = []

    def only_parsed(add):
        @wraps(add)
        def added(parser):
            add(parser)
            return calls.append

        return added

    monkeypatch.setattr(cli, "COMMANDS", {name: only_parsed(add) for name, add in COMMANDS.items()})
    return calls


def check_command(words: list[str], parsed: list) -> None:
    cli.main(words)
    given = parsed[-1]
    if words[0] == "launch":
        return check_command(given.command_line, parsed) if given.command_line else None
    if words[0] == "train-vae" and given.names:
        return load_config(next(iter(given.names)), given.overrides, AutoencoderConfig)
    if words[0] == "train":
        load_config(next(iter(given.names)), given.overrides)
    check_overrides(given.overrides)


def check_overrides(overrides: list[str]) -> None:
    """Keys and values are valid, those of the objective for one of the objectives, those of the sampler as well."""
    said = any(override.startswith("objective=") for override in overrides)
    errors = []
    for first in [[]] if said else [["objective=flow"], ["objective=ddpm"]]:
        try:
            config = config_from({}, "the page", [*first, *overrides])
            build(OBJECTIVES, config.objective, "objective")
            return bind(SAMPLERS, config.sampling.sampler, "sampling.sampler")
        except ValueError as error:
            errors.append(error)
    raise errors[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_key_exists(page, parsed):
    found = 0
    for snippet in snippets(page.read_text()):
        words = shlex.split(snippet, comments=True)
        if words[:1] == ["fastdit"] and len(words) > 2:
            check_command(words[1:], parsed)
        elif words[:1] == ["fastdit"]:
            assert words[1] in COMMANDS, snippet
        elif words and all(map(OVERRIDE.match, words)):
            own = page.stem == "autoencoder"
            config_from({}, "the page", words, AutoencoderConfig) if own else check_overrides(words)
        else:
            continue
        found += 1
    assert found > 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    text = page.read_text()
    headings = [re.sub(r"[^\w -]", "", heading).lower() for heading in re.findall(r"^#+ (.*)", text, re.M)]
    headings = {heading.replace(" ", "-") for heading in headings}
    for link in re.findall(r"\]\(([^)]+)\)", text):
        path, _, heading = link.partition("#")
        assert (page.parent / path).exists() if path else heading in headings, link


def test_configs_that_are_named_exist():
    for page in PAGES:
        for name in re.findall(r"fastdit (?:launch --gpus 8 )?train (\w+)", page.read_text()):
            assert name in shipped_names(), name
