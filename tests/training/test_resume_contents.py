"""A resume knows whether data.shards holds the images that the run was trained on, whatever the folder's name is."""

import json

import pytest
import torch

from fastdit.config import config_from
from fastdit.data.latents import LatentSpec
from fastdit.distributed import Ranks
from fastdit.training import checkpoint
from fastdit.training.loop import train
from fastdit.training.posthoc import rebuild
from fastdit.training.validation import loss_of_run
from helpers.sets import write

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = LatentSpec((1, 4, 4), 0.1, 0.0, vae="vae", codec="0" * 64, image_size=4)
ONE = Ranks(0, 0, 1, torch.device("cpu"))
OTHER = "was trained on other images than data.shards=.* has now"


def run(place, shards="latents", *overrides: str, resume: bool = False):
    """Two steps more than there are, on `shards` in `place`."""
    done = len(checkpoint.checkpoints(place / "run")) if resume else 0
    data = shards if ":" in shards else place / shards
    settings = {"steps": done + 2, "global_batch": 4, "checkpoint_every": 1, "keep_checkpoints": 0, "report": False,
                "precision": "fp32", "compile": False, "validate_every": 0, "ema_stds": [0.05, 0.1]}  # fmt: skip
    tree = {"run_dir": str(place / "run"), "model": {"variant": "DiT-1x24x2/2"}, "training": settings}
    config = config_from(tree, "test", [f"data.shards={data}", *overrides])
    return train(config, resume=resume, device="cpu")


def test_held_out_images_are_those_of_the_run(tmp_path, capsys):
    write(tmp_path / "latents", 40, spec=SPEC)
    run(tmp_path, "latents", "data.val_fraction=0.25")
    (tmp_path / "latents").rename(tmp_path / "moved")
    write(tmp_path / "latents", 43, spec=SPEC)
    with pytest.raises(ValueError, match=f"{OTHER}, and data.val_fraction=0.25 would hold out some of those; restore"):
        run(tmp_path, "latents", "data.val_fraction=0.25", resume=True)
    run(tmp_path, "moved", "data.val_fraction=0.25", resume=True)
    assert "other images" not in capsys.readouterr().out
    rebuild(tmp_path / "run", [0.1], tmp_path / "ema", say=lambda line: None)
    for path in (tmp_path / "run", tmp_path / "ema" / "std-0.100"):
        evaluate = {"ranks": ONE, "num_samples": 20}
        assert loss_of_run(path, **evaluate)["values"]["loss"] > 0
        with pytest.raises(ValueError, match=f"{OTHER}; restore them, or give --shards"):
            loss_of_run(path, **evaluate, overrides=[f"data.shards={tmp_path}/latents"])


def test_without_held_out_images_the_change_is_named(tmp_path, capsys):
    write(tmp_path / "latents", 40, spec=SPEC)
    run(tmp_path)
    write(tmp_path / "others", 40, start=1, spec=SPEC)  # as many, of other values
    run(tmp_path, "others", resume=True)
    assert f"other images in data.shards={tmp_path}/others" in capsys.readouterr().out
    run(tmp_path, "others", resume=True)  # the last checkpoint is of these
    assert "other images" not in capsys.readouterr().out


def test_the_sets_of_a_mixture_count_and_their_weights_do_not(tmp_path, capsys):
    write(tmp_path / "a", 20, spec=SPEC)
    write(tmp_path / "b", 20, start=100, spec=SPEC)
    a, b = ({"path": str(tmp_path / name), "weight": 1} for name in "ab")
    mixed = f"data.shards={json.dumps([a, b])}"
    run(tmp_path, "a", mixed, "data.val_fraction=0.25")
    run(tmp_path, "a", f"data.shards={json.dumps([a | {'weight': 3}, b])}", "data.val_fraction=0.25", resume=True)
    for others in ([b, a], [a]):
        with pytest.raises(ValueError, match=OTHER):
            run(tmp_path, "a", f"data.shards={json.dumps(others)}", "data.val_fraction=0.25", resume=True)


def test_generated_latents_are_known_by_what_generates_them(tmp_path, capsys):
    run(tmp_path, "synthetic:40/4x8x8/3")
    run(tmp_path, "synthetic:44/4x8x8/3", resume=True)
    assert "other images in data.shards=synthetic:44/4x8x8/3" in capsys.readouterr().out


def test_a_checkpoint_that_does_not_say_what_it_was_trained_on_is_not_continued(tmp_path):
    write(tmp_path / "latents", 40, spec=SPEC)
    last = run(tmp_path, "latents")
    facts = checkpoint.read_meta(last)
    for key in ("contents", "class_names", "seed"):
        checkpoint.write_meta(last, {name: value for name, value in facts.items() if name != key})
        remedy = f"start a new run_dir with training.init_from={last}"
        with pytest.raises(ValueError, match=f"^{last / checkpoint.META} has no '{key}'; {remedy}$"):
            run(tmp_path, "latents", resume=True)
