"""Every objective and every network, in every pair of formats: it comes back as it was, or is refused by name.

The cases are taken from the registries: each value of each option, with the other options as near to their defaults as
they can be.
"""

import dataclasses
import itertools
import re
import typing
from typing import Any, Literal

import pytest
import torch

from fastdit.config import load_config
from fastdit.convert import convert
from fastdit.convert.command import TIME_LAYER, WRITERS, is_pipeline
from fastdit.convert.loaded import CLOSE
from fastdit.diffusion.objectives import OBJECTIVES
from fastdit.schema import ModelConfig
from fastdit.training import checkpoint
from fastdit.training.state import load_network
from helpers.checkpoints import assert_same, make_checkpoint, quiet, weights, without

pytestmark = pytest.mark.usefixtures("one_thread")
# all directed pairs, first the one that keeps both sets of weights
WALK = ("fastdit", "official", "fastdit", "diffusers", "official", "diffusers", "fastdit")
NUMBER = 0.25  # another value that every option with a number accepts
# options of which no value may be refused, and values that may not be
TRAINING = {
    f"objective.{key}"
    for key in ("variance loss_type min_snr_gamma time_distribution time_mean time_scale shift sample_shift "
                "cosine_weight coupling train_eps sample_eps").split()
} | {"model.learn_sigma", "model.dropout", "model.class_dropout"}  # fmt: skip
KEPT = {
    "official": TRAINING | {"objective.interpolant=gvp", "objective.interpolant=vp", "objective.prediction=eps",
                            "objective.prediction=score", "objective.weight", "objective.schedule=cosine"},
    "diffusers": TRAINING | {"objective.schedule=cosine", "objective.schedule=scaled_linear", "model.qkv_bias",
                             "objective.schedule=zero_terminal_snr", "objective.prediction=v", "data.num_classes"},
}  # fmt: skip


def values(cls: type) -> dict[str, list[Any]]:
    """Every option with the values to try; the default comes first."""
    found = {}
    for field in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[field.name]
        kinds = {hint, *typing.get_args(hint)}
        if typing.get_origin(hint) is Literal:
            others = typing.get_args(hint)
        else:
            others = [True, False] if bool in kinds else [NUMBER] if float in kinds else [4] if int in kinds else []
        found[field.name] = [field.default, *(other for other in others if other != field.default)]
    return found


def objectives() -> list[dict[str, Any]]:
    """For each value of each option, the first valid combination with it, fewest changes of the defaults first."""
    cases = []
    for name, cls in OBJECTIVES.items():
        options = values(cls)
        literals = {key: some for key, some in options.items() if len(some) > 2 or isinstance(some[0], str)}
        combinations = [dict(zip(literals, choice, strict=True)) for choice in itertools.product(*literals.values())]
        combinations.sort(key=lambda c: sum(c[key] != options[key][0] for key in c))
        for key, value in ((key, value) for key, some in options.items() for value in some):
            for combination in combinations:
                case = {k: v for k, v in (combination | {key: value}).items() if v != options[k][0]}
                try:
                    cls(**case)
                except ValueError:
                    continue
                cases.append({"name": name, **case})
                break
            else:
                raise AssertionError(f"{name} has no valid combination with {key}={value!r}")
    return [case for i, case in enumerate(cases) if case not in cases[:i]]


def networks() -> list[dict[str, Any]]:
    options = {key: some for key, some in values(ModelConfig).items() if key not in ("variant", "attention")}
    options["decoder_blocks"] = [0, 1]  # of two blocks
    cases = [{key: value} for key, some in options.items() for value in some]
    cases += [{"class_dropout": 0.0}, {"classes": 0}, {"classes": 0, "class_dropout": 0.0}]
    return [case for case in cases if case != {"learn_sigma": False}]  # DDPM's default objective needs 2C channels


def name(case: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in case.items())


def read(folder):
    """Everything of a checkpoint but its weights: its config, except for places, and its facts."""
    config, meta = load_config(folder / "config.yaml"), checkpoint.read_meta(folder)
    config = dataclasses.replace(config, run_dir="")
    return config, {key: meta[key] for key in ("step", "class_names", "latents", "num_classes", "model")}


def outputs(folder):
    trained, generator = load_network(folder), torch.Generator().manual_seed(1)
    x, t = torch.randn(8, *trained.model.state_shape, generator=generator), torch.linspace(0.001, 1, 8).double()
    classes = trained.config.data.num_classes
    y = torch.arange(8) % (classes + (trained.model.null_label is not None)) if classes else None
    with torch.no_grad():
        return trained.model(x, trained.objective.model_time(t), y)


def walk(tmp_path, source, settings: dict[str, Any]) -> None:
    """Convert along WALK, leaving out the formats that refuse, and compare every checkpoint with the first."""
    place, passed = source, ["fastdit"]
    flow = load_config(source / "config.yaml").objective.name != "ddpm"
    for i, to in enumerate(WALK[1:]):
        out = tmp_path / f"{i}.pt" if to == "official" else tmp_path / f"{i}"
        if to == passed[-1]:
            continue
        before = sorted(tmp_path.iterdir())
        try:
            convert(place, to, out, say=quiet)
        except ValueError as error:
            named = {key for key in settings if re.search(rf"{re.escape(key)}=", str(error))}
            named |= {f"{key}={settings[key]}" for key in named}
            assert named and not KEPT.get(to, settings.keys()) & named and "\n" not in str(error), error
            assert sorted(tmp_path.iterdir()) == before
            continue
        place, passed = out, [*passed, to]
        if to == "fastdit":
            assert read(place) == read(source)
            folded = [TIME_LAYER] if flow and "diffusers" in passed else []
            kinds = ("ema", "ema") if "diffusers" in passed else ("model", "ema")
            for ours, theirs in zip(("model", "ema"), kinds, strict=True):
                assert_same(without(weights(place, ours), *folded), without(weights(source, theirs), *folded))
            ours, theirs = outputs(place), outputs(source)
            assert (ours - theirs).abs().max() <= (CLOSE * theirs.abs().max() if folded else 0)
        else:
            assert is_pipeline(place) == (to == "diffusers")
    assert passed[-1] == "fastdit"


@pytest.mark.parametrize("case", objectives(), ids=name)
def test_every_objective_survives_or_is_refused(place, tmp_path, case):
    source = make_checkpoint(place, tmp_path / "source", case, names=tuple("abcde"), vae="somebody/autoencoder")
    walk(tmp_path, source, {f"objective.{key}": value for key, value in case.items()})


@pytest.mark.parametrize("case", networks(), ids=name)
def test_every_network_survives_or_is_refused(place, tmp_path, case):
    objective = {"name": "flow"} if case.keys() & {"learn_sigma", "class_token"} else {"name": "ddpm"}
    source = make_checkpoint(place, tmp_path / "source", objective, vae="somebody/autoencoder", **case)
    settings = {"data.num_classes" if key == "classes" else f"model.{key}": value for key, value in case.items()}
    walk(tmp_path, source, settings)


def test_all_formats_are_walked_in_all_directions():
    assert set(itertools.pairwise(WALK)) == set(itertools.permutations(WRITERS, 2))
