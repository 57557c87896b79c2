"""Configuration: the dataclasses of schema.py, set from YAML and `section.key=value` overrides.

Values are converted by annotation: text is as it was written, so that run_dir=010 is 010. An unknown key is an error
that suggests the closest known one. A section `{name: ..., option: ...}` selects an entry of a registry (registry.py).
"""

import copy
import dataclasses
import difflib
import re
import sys
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastdit.files import DEPTH, parse_yaml, read_yaml, replace_text, yaml_text
from fastdit.registry import Choice, UnknownKey, convert
from fastdit.schema import SD_VAE, Config

CONFIGS = (Path(__file__).parents[1] / "configs", Path(sys.prefix) / "share/fastdit/configs")
SYNONYMS = {  # names that other code bases use
    "learning_rate": "training.lr", "batch_size": "training.global_batch", "global_batch_size": "training.global_batch",
    "micro_batch_size": "training.micro_batch", "gradient_accumulation_steps": "training.micro_batch",
    "max_steps": "training.steps", "train_steps": "training.steps", "ckpt_every": "training.checkpoint_every",
    "ema": "training.ema_decay", "mixed_precision": "training.precision", "weights": "training.init_from",
    "max_grad_norm": "training.grad_clip", "warmup": "training.warmup_steps", "scheduler": "training.lr_schedule",
    "guidance_scale": "sampling.cfg_scale", "cfg": "sampling.cfg_scale", "num_sampling_steps": "sampling.steps",
    "resolution": "data.image_size", "data_path": "data.shards", "feature_path": "data.shards",
    "results_dir": "run_dir", "output_dir": "run_dir", "out": "run_dir", "global_seed": "seed",
}  # fmt: skip


def load_config(path: str | Path, overrides: Iterable[str] = (), schema: type = Config) -> Any:
    """Reads a YAML file, or else an included config by its name, and applies overrides such as `training.lr=2e-4`.

    `schema`: the dataclass to make of it. Errors name file, key, value and remedy.
    """
    path = Path(path)
    if not path.is_file() and is_shipped(path):
        path = shipped_config(path.name)
    if not path.is_file():
        near = difflib.get_close_matches(path.stem, shipped_names(schema), 1, 0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"--config {path} does not exist; {hint}fastdit configs lists the included ones")
    try:
        tree = read_yaml(path) or {}
    except ValueError as error:
        raise ValueError(f"--config {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"--config {path} must contain sections such as `training:`, not a {type(tree).__name__}")
    return config_from(tree, path, overrides, schema)


def config_from(
    tree: dict[str, Any], where: str | Path, overrides: Iterable[str] = (), schema: type = Config
) -> Any:
    """The config of a tree as `to_tree` makes it, with overrides; errors name `where` it was read."""
    tree, overrides = copy.deepcopy(tree), list(overrides)
    sections = {key.partition(".")[0] for key in all_keys(schema) if "." in key}
    for override in sorted(overrides, key=_depth):  # objective=flow before objective.shift=3, wherever they stand
        _override(tree, override, sections)
    take_steps(tree.get("training"), [override.partition("=")[0] for override in overrides])
    data = tree.get("data")
    if isinstance(data, dict) and re.fullmatch(r"\d{1,6}x\d{1,6}", str(data.get("image_size"))):  # as for --image-size
        data["image_size"] = [int(side) for side in str(data["image_size"]).split("x")]
    try:
        return convert(schema, tree, "")
    except UnknownKey as error:
        sections, command = schema.others
        if sections & tree.keys():
            raise ValueError(f"{where} is a config of {command}; {schema.listed_by} lists the keys here") from None
        key, value = error.key, error.value
        while isinstance(value, dict) and len(value) == 1:  # an unknown section: name what was set in it
            [(name, value)] = value.items()
            key = f"{key}.{name}"
        near = suggest(key, schema)
        hint = f"did you mean {near!r}? All keys" if near else "all keys"
        message = f"{where}: {key}={value!r} is not a known key; {hint}: {schema.listed_by}"
        raise ValueError(message) from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def take_steps(training: Any, given: Collection[str]) -> None:
    """Where training.steps is `given` now, in the section `training`, it replaces the epochs of a config file."""
    if "training.steps" in given and isinstance(training, dict) and training.get("epochs"):
        if "training.epochs" in given:
            both = f"training.steps={training['steps']} and training.epochs={training['epochs']}"
            raise ValueError(f"{both} both set the length of the run; give one")
        training["epochs"] = 0


def assumed(config: Config) -> Config:
    """The config for a use without shards: what only they would tell is as for ImageNet at 256 px."""
    data = config.data
    size, classes = data.image_size or 256, 1000 if data.num_classes is None else data.num_classes
    return replace(config, data=replace(data, image_size=size, num_classes=classes, vae=data.vae or SD_VAE))


def all_keys(section: type = Config, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of the config with its annotation."""
    keys = {}
    for name, hint in typing.get_type_hints(section).items():
        nested = dataclasses.is_dataclass(hint) and hint is not Choice
        keys |= all_keys(hint, f"{prefix}{name}.") if nested else {f"{prefix}{name}": hint}
    return keys


def suggest(key: str, schema: type = Config) -> str:
    """The config key that `key` probably means, by its last part, a synonym, or its spelling; "" if none is near."""
    keys, last = list(all_keys(schema)), key.rpartition(".")[2].replace("-", "_").lower()
    names = {known.rpartition(".")[2]: known for known in reversed(keys)}  # the first section wins
    synonyms = {name: known for name, known in SYNONYMS.items() if known in keys}
    if found := synonyms.get(last) or names.get(last):
        return found
    near = [known for known in keys if len(last) > 2 and known.startswith(key)]
    if near := near or difflib.get_close_matches(key, keys, 1, 0.75):
        return near[0]
    near = difflib.get_close_matches(last, [*names, *synonyms], 1, 0.6)
    return names.get(near[0]) or synonyms[near[0]] if near else ""


def shipped_config(name: str) -> Path:
    """The path of configs/<name>.yaml in this clone or the installed wheel."""
    folder = next((p for p in CONFIGS if p.is_dir()), CONFIGS[0])
    return folder / (name if name.endswith(".yaml") else f"{name}.yaml")


def is_shipped(path: str | Path) -> bool:
    """Whether this is the name, or the path, of an included config."""
    path, own = Path(path), shipped_config(Path(path).name)
    return own.is_file() and (path.samefile(own) if path.is_file() else path.parent == Path())


def shipped_names(schema: type = Config) -> list[str]:
    """The names of the included configs: those of autoencoders begin with `vae_`."""
    names = sorted(path.stem for path in shipped_config("any").parent.glob("*.yaml"))
    return [name for name in names if name.startswith("vae_") == (schema is not Config)]


def check_used(
    overrides: Iterable[str], keys: Iterable[str], task: str, options: Mapping[str, str] | None = None,
    but: Iterable[str] = (),
) -> None:  # fmt: skip
    """ValueError for an override of a known key that a `task`, such as "when sampling", does not use.

    `keys`: the keys and sections that it uses, without those in `but`. `options`: of the command, by the keys they are
    like, such as {"seed": "--seed"}.
    """
    keys, known = list(keys), all_keys()
    for override in overrides:
        key, _, value = override.partition("=")
        key = key.removesuffix(".name")
        used = any(_within(key, section) for section in keys)
        option = (options or {}).get(key)
        if option and not used:
            raise ValueError(f"{override} changes nothing {task}; use {option} {value}")
        if key in but:
            raise ValueError(f"{override} changes nothing {task}; leave it out")
        if not used and any(_within(key, own) or _within(own, key) for own in known):  # else it is a typing mistake
            *most, last = (section if section in known else f"{section}.*" for section in keys)
            raise ValueError(f"{override}: only {', '.join(most)} and {last} can be changed {task}; leave it out")


def check_alone(option: str, key: str, overrides: Iterable[str]) -> None:
    """ValueError where an override sets the key that an option, such as `--steps=50`, sets."""
    for override in overrides:
        name = override.partition("=")[0].removesuffix(".name")
        if name == key or (_within(key, name) and name not in all_keys()):  # sampling=... but not sampling.sampler=...
            raise ValueError(f"{option} and {override} are the same; give one")


def _within(key: str, section: str) -> bool:
    return f"{key}.".startswith(f"{section}.")


def save_config(config: Any, path: str | Path) -> None:
    """Writes the resolved config as YAML; `load_config` returns an equal one."""
    replace_text(Path(path), yaml_text(to_tree(config)))


def to_tree(value: Any) -> Any:
    """Converts a config to plain dicts, lists and scalars."""
    if isinstance(value, Choice):
        return {"name": value.name, **value.options}
    if dataclasses.is_dataclass(value):
        return {f.name: to_tree(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [to_tree(item) for item in value] if isinstance(value, tuple) else value


def changes(before: Any, after: Any) -> str:
    """The keys in which two configs of one kind differ: "training.lr=0.0001 -> 0.0002, ..."."""
    old, new = (dict(leaves(to_tree(config))) for config in (before, after))
    keys = [key for key in old | new if old.get(key) != new.get(key)]
    return ", ".join(f"{key}={old.get(key)!r} -> {new.get(key)!r}" for key in keys)


def leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("training.lr", 0.0001) and so on, of a tree as `to_tree` makes it."""
    for key, value in tree.items():
        yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


def _depth(override: str) -> int:
    """The number of sections above the key; a choice and its `.name` are one key."""
    return override.partition("=")[0].removesuffix(".name").count(".")


def _override(tree: dict, override: str, known: Collection[str]) -> None:
    """Set a key, or some keys of one of the `known` sections."""
    dotted, sign, text = override.partition("=")
    if not sign or not dotted:
        raise ValueError(f"override {override!r} is not of the form section.key=value")
    *sections, last = dotted.split(".")
    if len(sections) > DEPTH:
        raise ValueError(f"override {override[:40]!r}... has {len(sections)} sections; a key has two or three")
    for section in sections:
        if isinstance(tree.get(section), str):  # `objective: flow` is short for `objective: {name: flow}`
            tree[section] = {"name": tree[section]}
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ValueError(f"override {override!r}: {section} is a value, not a section")
    text = text.strip()
    try:
        value = parse_yaml(text)
    except ValueError:  # such as run_dir=%j or data.shards=@scratch/latents: a plain string
        value = text
    comment = "#" in text and not isinstance(value, dict | list)  # which a command line has not
    if dotted in known and value is None:
        raise ValueError(f"override {override!r} has no value; use {dotted}={{key: value}}, or {dotted}.key=value")
    if dotted in known and isinstance(value, dict) and isinstance(tree.get(dotted), dict):
        value = tree[dotted] | value  # the section's other keys stay as they are
    tree[last] = text if (isinstance(value, str) or comment) and text[:1] not in ("'", '"', "!") else value
