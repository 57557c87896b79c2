"""Fine-tuning: a run starts from another one's weights and EMA, in every format, and says what it did not take over."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from fastdit.classes import Classes
from fastdit.config import config_from, load_config
from fastdit.convert import convert, read_initial
from fastdit.models.dit import DiT
from fastdit.training import checkpoint
from fastdit.training.initial import LABELS, Initial, take_over
from fastdit.training.loop import train
from helpers.runs import run

pytestmark = pytest.mark.usefixtures("one_thread")
STILL = ["training.steps=1", "training.lr=1e-30", "training.warmup_steps=0", "training.precision=fp32"]


@pytest.fixture(scope="module")
def source(world, tmp_path_factory):
    """A short run whose weights and EMA differ, and its newest checkpoint in every format."""
    place = tmp_path_factory.mktemp("source")
    overrides = [f"run_dir={place}/run", "training.steps=6", "training.ema_decay=0.5", "training.precision=fp32"]
    train(load_config(world / "config.yaml", overrides), device="cpu")
    for to, name in (("official", "run.pt"), ("diffusers", "pipe")):
        convert(place / "run", to, place / name, say=lambda line: None)
    return place


def weights(run_dir, name):
    return load_file(checkpoint.find(run_dir) / f"{name}.safetensors")


def start(world, run_dir, origin, *overrides):
    changes = [f"run_dir={run_dir}", f"training.init_from={origin}", *STILL, *overrides]
    train(load_config(world / "config.yaml", changes), device="cpu", read_initial=read_initial)


@pytest.mark.parametrize("name", ["run", "run/checkpoints/step-0000006", "run.pt", "pipe"])
def test_weights_and_ema_come_from_there(world, source, tmp_path, name):
    start(world, tmp_path / "fine", source / name)
    close = {"rtol": 0, "atol": 0} if name != "pipe" else {"rtol": 1e-4, "atol": 1e-5}
    for kind in ("model", "ema"):
        ours, theirs = weights(tmp_path / "fine", kind), weights(source / "run", "ema" if name == "pipe" else kind)
        blend = torch.lerp if kind == "ema" else lambda a, b, w: a  # one step of the average, at decay 0.9999
        raw = weights(tmp_path / "fine", "model")
        for key in ours.keys() - ({"t_embedder.mlp.0.weight"} if name == "pipe" else set()):  # equal as a function only
            torch.testing.assert_close(ours[key], blend(theirs[key], raw[key], 1 - 0.9999), **close)
    meta = checkpoint.read_meta(checkpoint.find(tmp_path / "fine"))
    assert meta["step"] == 1
    assert int(weights(tmp_path / "fine", "progress")["updates"]) == 1  # the optimizer is fresh


def test_under_zero_the_ema_comes_from_there_too(world, source, tmp_path):
    for stage in (1, 3):
        out = tmp_path / f"zero{stage}"
        places = [f"run_dir={out}", f"training.init_from={source}/run"]
        zero = ["training.engine=deepspeed", f"training.zero_stage={stage}"]
        run("train.py", "--config", str(world / "config.yaml"), *places, *STILL, *zero, processes=2)
        raw, theirs = weights(out, "model"), weights(source / "run", "ema")
        for key, value in weights(source / "run", "model").items():
            torch.testing.assert_close(raw[key], value, rtol=0, atol=0)
        for key, value in weights(out, "ema").items():
            torch.testing.assert_close(value, torch.lerp(theirs[key], raw[key], 1 - 0.9999), rtol=1e-6, atol=1e-7)


def test_further_classes_start_anew_and_the_first_line_says_so(world, source, tmp_path, capsys):
    start(world, tmp_path / "fine", source / "run", "data.num_classes=17")
    ours, theirs = weights(tmp_path / "fine", "model"), weights(source / "run", "model")
    assert ours[LABELS].shape == (18, 64) and torch.equal(ours[LABELS][-1], theirs[LABELS][-1])
    assert torch.equal(ours[LABELS][:10], theirs[LABELS][:10])
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if key != LABELS)
    said = capsys.readouterr().out.partition("\n")[0]
    assert f"from {source}/run, except for {LABELS} (7 of 17 classes: 10, 11, 12, ...)" in said


NULL, ALL_ANEW = "the null label", "all"


@pytest.mark.parametrize(
    ("theirs", "their_null", "ours", "null", "rows", "anew"),
    [
        ("ant bee", True, "bee ant", True, [1, 0, 2], ""),
        ("ant bee", True, "bee cat", True, [1, None, 2], "1 of 2 classes: cat"),
        ("ant bee", False, "ant bee", True, [0, 1, None], NULL),
        ("ant bee cat", False, "dog elk", True, [None] * 3, ALL_ANEW),  # as many rows
        ("ant bee", True, "cat dog elk", False, [None] * 3, ALL_ANEW),  # as many rows
        ("ant bee", True, "ant bee", False, [0, 1], ""),
        ("ant bee", True, "dog bee fox cat elk", False, [None, 1] + [None] * 3, "4 of 5 classes: dog, fox, cat, ..."),
        (2, True, "dog elk", True, [0, 1, 2], ""),  # as of official files: nothing is known but the number
        ("dog elk", True, 2, True, [0, 1, 2], ""),
        ("0 1", True, "dog elk", True, [0, 1, 2], ""),  # numbers in place of names
        ("0 1", True, "0 1 2", True, [0, 1, None, 2], "1 of 3 classes: 2"),
        (2, False, "dog elk", True, [0, 1, None], NULL),
        (3, False, "dog elk", True, [None] * 3, ALL_ANEW),
        (3, True, "dog elk", True, [None, None, 3], "2 of 2 classes: dog, elk"),
        (3, True, 4, False, [None] * 4, ALL_ANEW),
    ],
)
def test_classes_go_by_name_and_else_by_number(theirs, their_null, ours, null, rows, anew):
    def network(classes, null_row: bool) -> tuple[DiT, tuple[str, ...], int]:
        names = tuple(classes.split()) if isinstance(classes, str) else ()
        count = len(names) or classes
        options = {"hidden_size": 24, "depth": 1, "num_heads": 3, "num_classes": count}
        return DiT(4, class_dropout=0.1 * null_row, **options), names, count

    (old, known, _), (new, names, count) = network(theirs, their_null), network(ours, null)
    state = old.state_dict()
    other = state | {LABELS: state[LABELS] + 1}
    initial = Initial(state, other, known, their_null)
    found, kept = take_over(new.state_dict(), initial, "x.pt", new.null_label, Classes(count, names))
    assert kept == ([] if not anew else [LABELS] if anew == ALL_ANEW else [f"{LABELS} ({anew})"])
    for own, table in zip(found, (state[LABELS], other[LABELS]), strict=True):
        for row, origin in enumerate(rows):
            assert torch.equal(own[LABELS][row], new.state_dict()[LABELS][row] if origin is None else table[origin])


@pytest.mark.parametrize("name", ["run", "run.pt", "pipe"])
def test_every_format_of_a_run_knows_its_classes_and_null_label(world, source, name):
    initial = read_initial(str(source / name), load_config(world / "config.yaml"), lambda line: None)
    assert initial.class_names == tuple("0123456789") and initial.null_row


@pytest.mark.parametrize("classes, null_row", [(5, False), (4, True)])
def test_a_foreign_file_says_by_its_number_of_classes_whether_it_has_a_null_label(tmp_path, classes, null_row):
    network = DiT(4, hidden_size=24, depth=1, num_heads=3, num_classes=classes, class_dropout=0.1 * null_row)
    torch.save({"model": network.state_dict(), "args": {"num_classes": classes}}, tmp_path / "x.pt")
    config = config_from({"model": {"variant": "DiT-1x24x3/2"}, "run_dir": "x"}, "test")
    found = read_initial(str(tmp_path / "x.pt"), config, lambda line: None)
    assert (found.class_names, found.null_row) == ((), null_row)


def test_positions_are_computed_anew_and_other_networks_are_refused():
    torch.manual_seed(0)
    small = {"hidden_size": 24, "depth": 1, "num_heads": 3, "num_classes": 5}
    old, new = DiT(4, **small), DiT(8, learn_sigma=False, position="sincos_rope", **small)
    source = Initial(old.state_dict(), old.state_dict())
    [state, _], kept = take_over(new.state_dict(), source, "x.pt", new.null_label, Classes(5))
    assert kept == ["pos_embed", "rope", "final_layer.linear.weight", "final_layer.linear.bias"]
    assert torch.equal(state["pos_embed"], new.pos_embed) and torch.equal(state["rope"], new.rope)
    assert torch.equal(state["blocks.0.mlp.fc1.weight"], old.blocks[0].mlp.fc1.weight)
    for other in (DiT(8, **small | {"depth": 2}), DiT(8, mlp="swiglu", **small), DiT(8, **small | {"hidden_size": 36})):
        with pytest.raises(ValueError, match="training.init_from=x.pt is another network: .*; set model.variant and"):
            take_over(other.state_dict(), source, "x.pt", other.null_label, Classes(5))


def test_a_resume_continues_the_fine_tuning_and_reads_its_source_no_more(world, source, tmp_path):
    shutil.copytree(source / "run", tmp_path / "gone")
    start(world, tmp_path / "fine", tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    overrides = [f"run_dir={tmp_path}/fine", f"training.init_from={tmp_path}/gone", *STILL, "training.steps=2"]
    train(load_config(world / "config.yaml", overrides), resume=True, device="cpu", read_initial=read_initial)
    assert checkpoint.find(tmp_path / "fine").name == "step-0000002"


@pytest.mark.parametrize("name", ["converted", "run/checkpoints/step-0000006"])
def test_a_run_dir_that_is_a_checkpoint_is_refused_untouched(world, source, tmp_path, name):
    convert(source / "run", "fastdit", source / "converted", say=lambda line: None) if name == "converted" else None
    shutil.copytree(source / name, tmp_path / "it")
    before = {path.name: path.read_bytes() for path in (tmp_path / "it").iterdir()}
    for resume in (False, True):
        config = load_config(world / "config.yaml", [f"run_dir={tmp_path}/it", *STILL])
        with pytest.raises(ValueError, match="is a checkpoint, not a run, .* training.init_from="):
            train(config, resume=resume, device="cpu")
    assert {path.name: path.read_bytes() for path in (tmp_path / "it").iterdir()} == before


def test_a_folder_without_a_run_is_not_resumed(world, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    config = load_config(world / "config.yaml", [f"run_dir={tmp_path}/photos", *STILL])
    with pytest.raises(ValueError, match="holds files, but no run that could be resumed"):
        train(config, resume=True, device="cpu")


def test_a_missing_source_and_a_missing_reader_are_named(world, tmp_path):
    with pytest.raises(ValueError, match="training.init_from=nowhere.pt does not exist"):
        start(world, tmp_path / "run", "nowhere.pt")
    config = load_config(world / "config.yaml", [f"run_dir={tmp_path}/run", "training.init_from=x.pt", *STILL])
    with pytest.raises(ValueError, match="read_initial=fastdit.convert.read_initial"):
        train(config, device="cpu")
    assert not (tmp_path / "run").exists()
