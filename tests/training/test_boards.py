"""W&B gets what metrics.jsonl and TensorBoard get, works without an account, and is one run after a resume."""

import shutil
import stat
import sys

import pytest

from fastdit.training.boards import has_key
from fastdit.training.log import read_records
from helpers.runs import train_here
from helpers.wandb import fake_wandb, history

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = ["training.checkpoint_every=2", "model.variant=DiT-2x64x4/4", "data.val_fraction=0.1", "training.wandb=mine",
         "training.validate_images=40", "training.sample_every=2", "training.sample_images=3"]  # fmt: skip


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    module = fake_wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return module


def test_it_gets_every_value_and_picture_and_a_resume_continues_it(world, tmp_path, wandb, capsys):
    train_here(world, tmp_path / "run", *SHORT, "training.steps=3")
    train_here(world, tmp_path / "run", *SHORT, "training.steps=4", resume=True)
    first, second = wandb.runs
    assert first.given["project"] == "mine" and first.given["name"] == "run" and first.given["mode"] == "offline"
    assert first.given["config"]["training"]["lr"] == 1e-3 and first.given["resume"] is None
    assert (second.given["id"], second.given["resume"]) == (first.id, "allow")
    assert first.metrics == [("*", "step")] and first.finished and second.finished
    records, logged = read_records(tmp_path / "run" / "metrics.jsonl"), [*first.logged, *second.logged]
    assert [r["step"] for r in records] == [entry["step"] for entry in logged] == [1, 2, 2, 3, 3, 4, 4]
    for record, entry in zip(records, logged, strict=True):
        bins = record.pop("val_bins", [])
        del record["time"]
        pictures = {key: entry.pop(key) for key in ("samples", "samples_over_time") if key in entry}
        assert entry == record | {f"val_bins/{i:02d}": value for i, value in enumerate(bins)}
        assert not bins or pictures["samples"] == ("image", (32, 3 * 32 + 2 * 2, 3))
    said = capsys.readouterr().out
    assert said.count("W&B: no API key, so the run is logged to") == 2


def test_tensorboard_has_the_values_of_metrics_jsonl_also_after_a_resume(world, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plain = [setting for setting in SHORT if "wandb" not in setting]
    train_here(world, tmp_path / "run", *plain, "training.steps=3", "training.keep_checkpoints=0")
    shutil.rmtree(tmp_path / "run/checkpoints/step-0000003")  # as if the run had been killed: step 3 is repeated
    train_here(world, tmp_path / "run", *plain, "training.steps=4", resume=True)
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    records = read_records(tmp_path / "run/metrics.jsonl")
    for key, steps in (("loss", [1, 2, 3, 4]), ("val_loss", [2, 4])):
        points = [(event.step, event.value) for event in events.Scalars(key)]
        assert points == [(r["step"], pytest.approx(r[key])) for r in records if key in r]
        assert [step for step, _ in points] == steps
    assert [event.step for event in events.Images("samples")] == [2, 4]


@pytest.mark.parametrize("given", ["WANDB_MODE", "WANDB_API_KEY", "netrc"])
def test_with_a_key_or_a_mode_the_choice_is_left_to_it(world, tmp_path, wandb, monkeypatch, given):
    if given == "netrc":
        (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password " + 40 * "0" + "\n")
        (tmp_path / "netrc").chmod(stat.S_IRUSR)
        assert has_key()
    else:
        monkeypatch.setenv(given, "disabled")
        assert has_key() == (given == "WANDB_API_KEY")
    train_here(world, tmp_path / "run", *SHORT, "training.steps=1")
    assert "mode" not in wandb.runs[0].given


def test_another_host_needs_its_own_key_and_an_error_says_how_to_go_on(world, tmp_path, wandb, monkeypatch):
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_key()

    def fails(**given):
        raise RuntimeError("no route\nto host")

    wandb.init = fails
    with pytest.raises(ValueError, match=r"training.wandb=mine cannot be used \(no route to host\); set WANDB_MODE"):
        train_here(world, tmp_path / "run", *SHORT, "training.steps=1")


@pytest.fixture
def real(monkeypatch, tmp_path):
    import wandb

    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield wandb
    wandb.teardown()


def test_a_run_after_one_that_failed_has_its_own_values(world, tmp_path, real):
    with pytest.raises(ValueError, match="not finite in 1 step in a row"):
        train_here(world, tmp_path / "one", *SHORT, "training.steps=3", "training.lr=1e30", "training.max_skipped=1")
    train_here(world, tmp_path / "two", *SHORT, "training.steps=3")
    real.teardown()
    one, two = ((tmp_path / name / "wandb_id").read_text() for name in ("one", "two"))
    [file] = (tmp_path / "two" / "wandb").glob("offline-run-*/*.wandb")
    assert one != two and file.stem == f"run-{two}"
    assert [entry["step"] for entry in history(file)] == [1, 2, 2, 3, 3]


def test_the_files_of_the_real_package_hold_the_values_of_metrics_jsonl(world, tmp_path, real):
    run = tmp_path / "run"
    train_here(world, run, *SHORT, "training.steps=3")
    train_here(world, run, *SHORT, "training.steps=4", resume=True)
    real.teardown()
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    assert {path.stem.removeprefix("run-") for path in files} == {(run / "wandb_id").read_text()} and len(files) == 2
    logged, records = [entry for path in files for entry in history(path)], read_records(run / "metrics.jsonl")
    assert [entry["step"] for entry in logged] == [1, 2, 2, 3, 3, 4, 4]
    for record, entry in zip(records, logged, strict=True):
        wanted = {key: value for key, value in record.items() if key not in ("val_bins", "time")}
        wanted |= {f"val_bins/{i:02d}": value for i, value in enumerate(record.get("val_bins", []))}
        pictures = [value for key, value in entry.items() if key in ("samples/path", "samples_over_time/path")]
        own = ("_", "samples/", "samples_over_time/")  # _step and _runtime are W&B's
        assert {key: value for key, value in entry.items() if not key.startswith(own)} == wanted
        assert bool(pictures) == ("sample_s" in record)
        assert all(any((path.parent / "files" / name).is_file() for path in files) for name in pictures)
