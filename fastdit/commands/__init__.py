"""The subcommands of `fastdit`: each function adds its arguments to a parser and returns what runs it."""

from fastdit.commands.judge import evaluate, likelihood, report, verify
from fastdit.commands.latents import import_, shards
from fastdit.commands.look import grid, neighbors
from fastdit.commands.make import extract, launch, quickstart, sample, train, train_vae
from fastdit.commands.tools import configs, convert, doctor, ema, plan

COMMANDS = {
    command.__name__.rstrip("_").replace("_", "-"): command
    for command in (extract, import_, shards, train, train_vae, sample, grid, evaluate, neighbors, report, plan,
                    convert, verify, ema, likelihood, configs, doctor, quickstart, launch)  # fmt: skip
}
