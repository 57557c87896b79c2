"""Files that anyone may have written run nothing, block nothing and stay small, whoever reads them."""

import json
import math
import os
import pickle
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastdit import cli
from fastdit.config import load_config
from fastdit.convert import convert
from fastdit.files import append_json, append_to, parse_yaml, read_array, read_json, replace_text, sealed
from fastdit.models.dit import variant_shape
from fastdit.report.facts import read_run
from fastdit.sampling import sample
from fastdit.training import checkpoint
from fastdit.training.log import rewind
from fastdit.verify import verify
from helpers.checkpoints import golden_weights, quiet
from helpers.runs import train_here

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = ["training.steps=2", "training.checkpoint_every=2", "model.variant=DiT-1x32x2/4", "training.precision=fp32"]


class Evil:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize(
    "text, words",
    [
        ("!!python/object/apply:os.system [false]", "could not determine a constructor"),
        ("a: &a [1]\nb: [*a, *a]", r"aliases \(\*name\) are not supported"),
        ("a: &a {b: 1}\nc: {<<: *a}", "are not supported"),
        ("[" * 60 + "]" * 60, "more than 50 levels"),
        ("a: [", "expected the node content"),
        ("9" * 5000, "4300 digits"),
    ],
)
def test_yaml_has_plain_values_only(text, words):
    with pytest.raises(ValueError, match=words) as error:
        parse_yaml(text)
    assert "\n" not in str(error.value)


def test_an_override_with_ten_thousand_sections_is_one_line(tmp_path):
    (tmp_path / "c.yaml").write_text("")
    with pytest.raises(ValueError, match="has 9999 sections; a key has two or three"):
        load_config(tmp_path / "c.yaml", [".".join("a" * 10_000) + "=1"])


@pytest.mark.parametrize(
    "make, words",
    [
        (os.mkfifo, "is not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
        (lambda path: path.mkdir(), "is not a regular file"),
        (lambda path: (path.touch(), os.truncate(path, 1 << 40)), "has 1099511627776 bytes, more than"),
        (lambda path: path.write_bytes(b"\xff"), "is damaged: 'utf-8'"),
        (lambda path: path.write_text("[" * 100_000), "is damaged: maximum recursion"),
        (lambda path: path.write_text('{"a":' * 60 + "1" + "}" * 60), "has more than 50 levels"),
        (lambda path: path.write_text("[1]"), "it contains a list"),
        (lambda path: path.write_text('{"a": ' + "9" * 5000 + "}"), "4300 digits"),
    ],
)
def test_only_small_regular_files_are_read_as_json(tmp_path, make, words):
    make(tmp_path / "x.json")
    with pytest.raises(ValueError, match=f"x.json .*{words}|x.json {words}"):
        read_json(tmp_path / "x.json")


def test_arrays_hold_no_pickles_and_no_more_than_their_file(tmp_path):
    objects = np.array([Evil(tmp_path / "canary")], object)
    np.save(tmp_path / "objects.npy", objects)
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000,)}"
    huge = b"\x93NUMPY\x01\x00\x76\x00" + header.ljust(118)
    negative = huge.replace(b"(1000000000000000,)", b"(-1,)              ") + bytes(8)
    for data in ((tmp_path / "objects.npy").read_bytes(), huge, negative, b"", b"PK\x03\x04", pickle.dumps(objects)):
        with pytest.raises(ValueError, match="it is not an array"):
            read_array(data)
    assert not (tmp_path / "canary").exists()
    for array in (np.arange(3), np.array(7), np.zeros((0, 2)), np.asfortranarray(np.arange(6).reshape(2, 3))):
        np.save(tmp_path / "numbers.npy", array)
        np.testing.assert_array_equal(read_array((tmp_path / "numbers.npy").read_bytes()), array, strict=True)


def test_a_link_in_place_of_a_file_is_replaced_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    for name in ("x", "x.partial"):
        (tmp_path / name).symlink_to("victim")
    replace_text(tmp_path / "x", "new")
    assert (tmp_path / "victim").read_text() == "precious" and (tmp_path / "x").read_text() == "new"


def test_lines_of_json_have_no_nan(tmp_path):
    """Other programs refuse NaN and Infinity."""
    append_json(tmp_path / "x.jsonl", {"a": math.nan, "b": [1.5, -math.inf], "c": {"d": (2, math.inf)}})
    append_json(tmp_path / "x.jsonl", {"a": 1})
    assert (tmp_path / "x.jsonl").read_text() == '{"a": null, "b": [1.5, null], "c": {"d": [2, null]}}\n{"a": 1}\n'


def test_a_log_is_appended_to_a_regular_file_only(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "link").symlink_to("victim")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(ValueError, match=f"{name} is not a regular file; remove it"):
            append_to(tmp_path / name)
    for line in ("1\n", "2\n"):
        with append_to(tmp_path / "log") as file:
            file.write(line)
    assert (tmp_path / "log").read_text() == "1\n2\n" and (tmp_path / "victim").read_text() == "precious"


def test_lines_that_are_no_records_are_dropped_from_a_log(tmp_path):
    """As a power loss leaves the last one."""
    lines = ['{"step": 1}', '{"a": 1}', '{"step": 3, "lo', "[" * 5000 + "}", "\0\0}", '{"step": null}', '{"step": 9}']
    (tmp_path / "log").write_text("\n".join(lines))
    rewind(tmp_path / "log", 5)
    assert (tmp_path / "log").read_text() == '{"step": 1}\n'
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is not a regular file; remove it"):
        rewind(tmp_path / "pipe", 5)


def seal(folder, **changes):
    """Write checkpoint.json with changed facts and the right digest."""
    meta = json.loads((folder / checkpoint.META).read_text()) | changes
    (folder / checkpoint.META).write_text(json.dumps(sealed(meta)))


@pytest.fixture
def trained(world, tmp_path):
    return train_here(world, tmp_path / "run", *SHORT)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"step": "x"}, "step='x'"),
        ({"step": -1}, "step=-1"),
        ({"class_names": 5}, "class_names is not a list of names"),
        ({"files": {"../../x": {"bytes": 1, "sha256": ""}}}, "lists ../../x, which is in another folder"),
        ({"files": {"x": {"bytes": float("inf"), "sha256": ""}}}, "OverflowError"),
        ({"files": {"x": 1}}, "it lists x without bytes and sha256"),
        ({"files": {"x": {"bytes": 1}}}, "it lists x without bytes and sha256"),
    ],
)
def test_facts_of_another_type_are_damage(trained, changes, words):
    seal(trained, **changes)
    meta, [fault] = checkpoint.inspect(trained)
    assert meta == {} and f"{trained}/checkpoint.json is damaged" in fault and words in fault


@pytest.mark.parametrize("latents", [None, {}, {"shape": [4, -1, 8]}, {"shape": [10**9] * 3}, [1]])
def test_latents_of_another_form_are_one_line(trained, latents, capsys, monkeypatch):
    facts = json.loads((trained / checkpoint.META).read_text())["latents"]
    seal(trained, latents={**facts, **latents} if isinstance(latents, dict) and latents else latents)
    monkeypatch.setattr(sys, "argv", ["fastdit", "verify", str(trained)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "wrong: " in (said := capsys.readouterr().out) and "latents" in said


@pytest.mark.parametrize("name", ["exp_avg", "ema", "progress"])
def test_state_of_another_network_is_not_resumed(world, trained, name):
    path, meta = trained / f"{name}.safetensors", checkpoint.read_meta(trained)
    state = {key: value.clone() for key, value in load_file(path).items()}
    for change in (lambda s: s.pop(next(iter(s))), lambda s: s.update(x=torch.ones(2)),
                   lambda s: s.update({k: v.bool() for k, v in s.items()})):  # fmt: skip
        changed = dict(state)
        change(changed)
        save_file(changed, path)
        checkpoint.write_meta(trained, meta)
        with pytest.raises(ValueError, match=f"{path} is not of this run: "):
            train_here(world, trained.parents[1], *SHORT, resume=True)


def test_weights_of_another_type_are_not_sampled(trained, tmp_path):
    path, meta = trained / "ema.safetensors", checkpoint.read_meta(trained)
    save_file({key: value.to(torch.int64) for key, value in load_file(path).items()}, path)
    checkpoint.write_meta(trained, meta)
    with pytest.raises(ValueError, match="is torch.int64, not torch.float32"):
        sample(trained, tmp_path / "out", 2, device="cpu")


def test_a_fifo_in_place_of_weights_blocks_no_one(world, trained):
    path, meta = trained / "exp_avg.safetensors", checkpoint.read_meta(trained)
    path.unlink()
    os.mkfifo(path)
    checkpoint.write_meta(trained, meta)
    assert any("exp_avg.safetensors is missing, or not a regular file" in line for line in verify(trained, quiet))
    with pytest.raises(ValueError, match="is missing, or not a regular file"):
        train_here(world, trained.parents[1], *SHORT, resume=True)


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("x", "t", "y", "out"):
            archive.writestr(f"{name}.npy", bytes(1 << 27))


@pytest.mark.parametrize(
    "make, words",
    [
        (bomb, "it holds 536870912 bytes, more than"),
        (lambda path: path.write_bytes(b"x"), "not a zip file"),
        (lambda path: np.savez(path, x=np.ones(3)), "no item named 't.npy'"),
        (lambda path: np.savez(path, **{k: np.array([{}], object) for k in ("x", "t", "y", "out")}), "not an array"),
        (lambda path: np.savez(path, **dict.fromkeys(("x", "t", "y", "out"), np.ones(3))), "inputs of another shape"),
    ],
)
def test_a_recorded_output_that_is_none_is_a_finding(place, tmp_path, make, words):
    folder = shutil.copytree(place / "ddpm", tmp_path / "ddpm")
    meta = checkpoint.read_meta(folder)
    make(folder / "golden.npz")
    checkpoint.write_meta(folder, meta)
    assert any("golden.npz" in line and words in line for line in verify(folder, quiet))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s | {"pos_embed": torch.zeros(1).expand(1, 10**6, 10**6)}, "not a tensor of plain numbers"),
        (lambda s: s | {"pos_embed": torch.sparse_coo_tensor(size=(1, 9, 48))}, "not a tensor of plain numbers"),
        (lambda s: s | {"pos_embed": torch.empty(1, 16, 48, device="meta")}, "not a tensor of plain numbers"),
        (lambda s: s | {"pos_embed": s["pos_embed"].long()}, "not a tensor of plain numbers"),
        (lambda s: s | {7: torch.zeros(1)}, "7 is not the name of a tensor"),
        (lambda s: s | {"blocks.999999999999.x": torch.zeros(1)}, "has no place in this network|is missing"),
    ],
)
def test_tensors_that_are_not_all_in_the_file_are_refused(tmp_path, change, words):
    torch.save(change(golden_weights()), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=words):
        convert(tmp_path / "x.pt", "fastdit", tmp_path / "out", overrides=["objective=ddpm"], heads=4, say=quiet)


@pytest.mark.parametrize(
    "file, change, words",
    [
        ("transformer/config.json", {"num_layers": 10**12}, "num_layers=1000000000000 is out of range"),
        ("transformer/config.json", {"auto_map": {"AutoModel": "evil.Evil"}}, "auto_map=.* that fastdit does not know"),
        ("transformer/config.json", {"_class_name": "evil.Evil"}, "contains a evil.Evil"),
        ("model_index.json", {"id2label": True}, "id2label is a bool, not names by label"),
        ("model_index.json", {"_class_name": ["evil", "Evil"]}, "_class_name=.* cannot be converted"),
    ],
)
def test_a_diffusers_folder_starts_no_code_and_no_endless_network(place, tmp_path, file, change, words):
    folder = shutil.copytree(place / "ddpm_pipe", tmp_path / "pipe")
    for parent in (folder, folder / "transformer"):
        (parent / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Evil: pass\n")
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    with pytest.raises(ValueError, match=words):
        convert(folder, "fastdit", tmp_path / "out", say=quiet)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("variant", ["DiT-1001x64x4/2", "DiT-2x65600x4/2", "DiT-2x64x4/2000"])
def test_a_network_of_a_billion_blocks_is_not_built(variant):
    with pytest.raises(ValueError, match=f"model.variant='{variant}' is too large"):
        variant_shape(variant)


def test_damaged_weights_end_the_rebuilding_of_averages_in_one_line(world, tmp_path, monkeypatch, capsys):
    folder = train_here(world, tmp_path / "run", *SHORT, "training.ema_stds=[0.05,0.1]")
    meta = checkpoint.read_meta(folder)
    torch.save({"x": Evil(tmp_path / "canary")}, folder / "model.safetensors")
    checkpoint.write_meta(folder, meta)
    monkeypatch.setattr(sys, "argv", ["fastdit", "ema", f"{tmp_path}/run", "--std", "0.07", "--out", f"{tmp_path}/out"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "model.safetensors is not a safetensors file, or is damaged" in capsys.readouterr().err
    assert not (tmp_path / "canary").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "is not a PNG image"),
        (lambda path: Image.new("L", (32, 32)).save(path), "in mode L, not RGB"),
        (lambda path: Image.new("RGB", (8, 8)).save(path), "not of the same size"),
    ],
)  # fmt: skip
def test_samples_that_are_no_images_of_ours_are_named(place, tmp_path, make, words):
    """PostScript would start Ghostscript."""
    quick = ["sampling.steps=2"]
    sample(place / "ddpm", tmp_path / "out", 2, overrides=quick, device="cpu")
    make(tmp_path / "out" / "images" / "000001.png")
    with pytest.raises(ValueError, match=f"000001.png .*{words}.*; remove it"):
        sample(place / "ddpm", tmp_path / "out", 2, overrides=quick, device="cpu")


def test_a_report_leaves_out_records_of_other_types(world, tmp_path):
    train_here(world, tmp_path / "run", *SHORT)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    lines = ['{"step": "x"}', '{"step": 1, "steps_per_s": []}', "[1]", "{", '{"step": 1e999}']
    lines.append('{"step": ' + "9" * 400 + "}")
    for name in ("metrics.jsonl", "skipped.jsonl", "environment.jsonl"):
        with append_to(tmp_path / "run" / name) as file:
            file.write("\n".join([*lines, '{"nodes": 0, "processes": 1}', ""]))
    (tmp_path / "run" / "quality.json").write_text('[1, {"name": "a"}, {"name": "FID", "value": 3.0}]')
    run = read_run(tmp_path / "run")
    assert [record["step"] for record in run.metrics] == [1, 2] and len(run.skipped) == len(run.starts) == 1
    assert run.quality == [{"name": "FID", "value": 3.0}]
    rewind(tmp_path / "run" / "metrics.jsonl", 5)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().startswith(before)
