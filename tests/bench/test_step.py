"""`python -m bench.step` measures what it says: the gate catches wrong contestants, failures end only their own row."""

import json
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import record
from bench.step import __main__ as program
from bench.step import cases, contest, contestant, gate, stacks
from bench.step.cases import Case
from bench.step.contest import Row, compete
from bench.step.gate import gate_errors
from bench.step.reference import Inputs, PlainDDPM, PlainDiT
from bench.step.stacks import build_case, fill
from fastdit.training.engine import TorchEngine
from helpers import ROOT
from helpers.runs import ENVIRONMENT

EAGER = ("training.compile=false",)
CHECKOUT = """
from bench.step.reference import PlainDiT, torch

class DiT(PlainDiT):  # the constructor and the label dropout of the released models.py
    def __init__(self, input_size, patch_size, in_channels, hidden_size, depth, num_heads, num_classes,
                 class_dropout_prob=0.1, mlp_ratio=4.0, learn_sigma=True):
        super().__init__(input_size, patch_size, in_channels, hidden_size, depth, num_heads, num_classes)
        self.y_embedder.dropout_prob = class_dropout_prob
        self.null = num_classes

    def forward(self, x, t, y):
        if self.training and self.y_embedder.dropout_prob > 0:
            y = torch.where(torch.rand(len(y)) < self.y_embedder.dropout_prob, self.null, y)
        {change}
        return super().forward(x, t, y)
"""


pytestmark = pytest.mark.usefixtures("one_thread")


def checkout(folder: Path, change: str = "pass") -> Path:
    folder.mkdir()
    (folder / "models.py").write_text(CHECKOUT.format(change=change))
    return folder


def tiny(name: str, stack: str, *overrides: str, repo: str = "") -> Case:
    return Case(name, stack, "tiny", 4, "cpu", overrides, repo)


@pytest.fixture(scope="module")
def first():
    """fastdit's gate in fp32, and the oracle's."""
    verdict = build_case(tiny("fastdit", "fastdit", *EAGER, "training.precision=fp32")).gate()
    return verdict, build_case(tiny("oracle", "oracle")).gate()


def objection(verdict, truth) -> str:
    return gate.objection(verdict.precision, gate_errors(verdict, truth))


@pytest.mark.parametrize("stack", ["official", "fast-dit"])
def test_stacks_compute_the_same(first, stack):
    verdict, truth = first
    assert gate_errors(verdict, truth)[0] < 1e-5
    assert not objection(build_case(tiny(stack, stack)).gate(), truth)


@pytest.mark.parametrize("overrides", [(), ("training.residual=bf16",)])
def test_fastdit_in_bf16_passes_within_its_noise(first, overrides):
    verdict = build_case(tiny("fastdit", "fastdit", *EAGER, *overrides)).gate()
    assert verdict.precision == "bf16" and not objection(verdict, first[1])
    assert gate_errors(verdict, first[1])[0] > 1e-5  # it is not fp32 in disguise


def test_the_plain_loss_is_the_recorded_one():
    """golden/ddpm.npz, case learned_range_mse: the oracle itself reproduces the published numbers."""
    golden = np.load(ROOT / "tests/golden/ddpm.npz", allow_pickle=False)
    x_0, noise, output = (torch.from_numpy(golden[key]) for key in ("x_start", "noise", "model_output"))
    inputs = Inputs(x_0, None, torch.from_numpy(golden["t"]), noise)
    losses = PlainDDPM(tables=None).losses(lambda x, t, y: output, inputs)
    torch.testing.assert_close(losses, torch.from_numpy(golden["loss/learned_range_mse/loss"]), atol=1e-5, rtol=1e-5)


def test_the_plain_network_is_the_recorded_one():
    golden = np.load(ROOT / "tests/golden/dit.npz", allow_pickle=False)
    config = json.loads(str(golden["config"]))
    keys = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")
    model = PlainDiT(**{key: config[key] for key in keys})
    state = {k.removeprefix("weights/"): torch.from_numpy(golden[k]) for k in golden if k.startswith("weights/")}
    model.load_state_dict(state)
    out = model(*(torch.from_numpy(golden[key]) for key in ("x", "t", "y")))
    torch.testing.assert_close(out, torch.from_numpy(golden["out"]), atol=1e-5, rtol=1e-5)


WRONG = {  # what a stack might get wrong without any error
    "time": "t = t - 1",
    "labels": "y = y.roll(1)",
    "noise": "x = x + 0.02 * torch.randn_like(x)",
    "a bias": "self.blocks[1].mlp.fc2.bias.data.zero_()",
    "a gate": "x = x * 0.99",
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_wrong_network_is_caught(first, tmp_path, change):
    repo = str(checkout(tmp_path / "repo", change))
    verdict = build_case(tiny("official", "official", repo=repo)).gate()
    assert "computes something else" in objection(verdict, first[1])


@pytest.mark.parametrize("what", ["no optimiser", "half the rate", "no average"])
def test_a_wrong_step_is_caught(first, what):
    bench = build_case(tiny("official", "official"))
    if what == "no optimiser":
        bench.optimizer.step = lambda: None
    elif what == "half the rate":
        right = bench.set_lr
        bench.set_lr = lambda lr: right(lr / 2)
    else:
        bench.average = lambda: None
    assert objection(bench.gate(), first[1])


@pytest.mark.parametrize("what", ["moments", "y", "step", "lr"])
def test_a_graph_that_replays_what_it_was_captured_with_is_caught(first, what):
    bench = build_case(tiny("fastdit", "fastdit", *EAGER))
    right, names, calls = bench.work, ("step", "lr", "moments", "y"), []

    def stale(*given):
        calls.append(dict(zip(names, given, strict=True)))
        if len(calls) > 4:  # three eager steps, the capture, then replays
            given = ({**calls[-1], what: calls[3][what]}[name] for name in names)
        return right(*given)

    bench.work = stale
    if what == "lr":  # in bf16, whose own noise is 0.04
        assert gate_errors(bench.gate(), first[1])[1] > 1.5 * gate.TOLERANCE["bf16"][1]
    else:
        with pytest.raises(ValueError, match="step 4 did not compute on the (x_0|y) that its seed"):
            bench.gate()


def test_half_a_batch_is_the_first_half_of_the_images():
    whole, half = (stacks.host_batches(cases.SIZES["tiny"], batch, False) for batch in (4, 2))
    for ours, theirs in zip(half, whole, strict=True):
        assert torch.equal(ours[0], theirs[0][:2]) and torch.equal(ours[1], theirs[1][:2])
    assert not torch.equal(whole[0][0], whole[1][0])


def test_weights_are_equal_by_name_and_leave_nothing_silent():
    models = [build_case(tiny(stack, stack, *EAGER)).model for stack in ("fastdit", "official")]
    for model in models:
        fill(model)
    ours, theirs = map(stacks.trained, models)
    assert list(ours) == list(theirs)
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]) and weight.abs().max() > 0


@pytest.fixture
def here(monkeypatch):
    """Runs contestants within this process; the list holds the jobs in their order."""
    jobs = []

    def perform(job, timeout_s):
        jobs.append(json.loads(json.dumps(job)))
        return json.loads(json.dumps(contestant.perform(jobs[-1])))

    monkeypatch.setattr(program, "Processes", lambda folder, ahead: Here)
    monkeypatch.setitem(record.PRODUCT_SIDE, "cpu", 128)  # bf16 takes seconds on processors without its instructions
    Here = type("Here", (), {"__call__": lambda self, *given: perform(*given), "close": lambda self: None})()
    with torch._dynamo.config.patch(automatic_dynamic_shapes=True):  # restored afterwards
        yield Namespace(jobs=jobs, perform=perform)


def names(jobs: list[dict]) -> list[tuple[str, int]]:
    return [(job["case"]["name"], job["case"]["batch"]) for job in jobs]


def compete_here(here, *names: str, **options) -> list[Row]:
    chosen = [tiny(name, name, *(EAGER if name == "fastdit" else ())) for name in names]
    options = {"rounds": 2, "steps": 1, "warmup": 0, "budget_s": 600, "profile": True, **options}
    return compete(chosen, here.perform, **options)


def test_the_first_contestant_too_halves_its_batch_and_the_others_take_the_same(here, monkeypatch):
    right = TorchEngine.__call__

    def call(self, x, t, y):
        if len(y) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return right(self, x, t, y)

    monkeypatch.setattr(TorchEngine, "__call__", call)
    rows = compete_here(here, "fastdit", "official")
    assert [(row.case.name, row.case.batch, row.failed, len(row.rates)) for row in rows] == [
        ("fastdit", 2, "", 2), ("official", 2, "", 2)
    ]  # fmt: skip
    assert rows[1].errors[0] < 1e-5 < rows[0].errors[0] < 4e-3
    assert names(here.jobs)[:4] == [("fastdit", 4), ("fastdit", 2), ("oracle", 2), ("official", 2)]
    assert names(here.jobs).count(("oracle", 2)) == 1


def test_the_first_turn_gates_and_profiles_and_the_others_only_time(here):
    rows = compete_here(here, "fastdit", "official")
    assert rows[0].results[0]["profile_ms"] and all(len(row.rates) == 2 for row in rows)
    assert [name for name, _ in names(here.jobs)] == ["fastdit", "oracle", "official", "official", "fastdit"]
    assert [job["gate"] for job in here.jobs] == [True] * 3 + [False] * 2
    assert [job["profile"] for job in here.jobs] == [2, 0, 0, 0, 0]  # references run no kernel of interest


def test_a_profiler_that_fails_costs_no_turn(here, monkeypatch):
    def profile(*_):
        raise RuntimeError("CUPTI")

    monkeypatch.setattr(contestant, "profile", profile)
    rows = compete_here(here, "fastdit", rounds=1)
    assert not rows[0].failed and rows[0].rates and "profile_ms" not in rows[0].results[0]


def test_the_oracle_runs_once_and_its_results_serve_other_runs(here, tmp_path):
    first = compete_here(here, "official", rounds=1, truth=tmp_path / "truth.json")
    second = compete_here(here, "official", rounds=1, truth=tmp_path / "truth.json")
    assert [name for name, _ in names(here.jobs)] == ["official", "oracle", "official"]
    assert first[0].errors == second[0].errors and second[0].rates


def test_the_oracles_results_of_other_inputs_are_not_used(here, tmp_path):
    truth = tmp_path / "truth.json"
    compete_here(here, "official", rounds=1, truth=truth)
    kept = json.loads(truth.read_text())
    kept["tiny cpu 4"]["drawn"][2][0] *= 1.001  # the third step's images
    truth.write_text(json.dumps(kept))
    (row,) = compete_here(here, "official", rounds=1, truth=truth)
    assert [name for name, _ in names(here.jobs)] == ["official", "oracle"] * 2 and row.rates


def test_the_stored_results_are_the_oracles_own(first, monkeypatch, tmp_path, here):
    stored = tmp_path / "oracle.json"
    compete_here(here, "official", rounds=1, truth=stored)
    monkeypatch.setattr(contest, "STORED", stored)
    compete_here(here, "official", rounds=1, truth=tmp_path / "new.json")
    assert [name for name, _ in names(here.jobs)] == ["official", "oracle", "official"]
    assert not (tmp_path / "new.json").exists()  # nothing to add
    for key, result in json.loads(contest.STORED.read_text()).items():
        losses, moved = (torch.tensor(result[name]) for name in ("losses", "moved"))
        assert losses.shape == (len(gate.RATES), int(key.split()[-1])) and (moved > 0).all()


def test_a_turn_times_fewer_steps_to_end_in_time():
    bench = build_case(tiny("official", "official"))
    right = bench.step

    def step(i):
        time.sleep(0.05)
        return right(i)

    bench.step = step
    for turn_s, least, most in ((100, 40, 40), (1.0, 4, 20), (0.0, 3, 3)):
        seconds = contestant.time_steps(bench, torch.device("cpu"), 1, 40, time.perf_counter() + turn_s)
        assert least <= len(seconds) <= most


def test_caches_are_filled_with_three_blocks_of_fastdit_and_the_whole_baseline(monkeypatch, tmp_path, capsys):
    begun = []

    class Starts:
        def begin(self, job):
            begun.append(job)
            return None, tmp_path

        def finish(self, process, file, timeout_s):
            return {"first_step_s": 3.0} if len(begun) == 2 else {}

    on = cases.Case("fastdit-all-on", "fastdit", "XL/2", 256, "cuda", ("training.residual=bf16",))
    chosen = [on, *(replace(on, name=name, stack=name, overrides=()) for name in ("strong", "official"))]
    contest.fill_caches(chosen, Starts(), 10.0)
    assert [job["case"]["overrides"][-1:] for job in begun] == [("model.variant=DiT-3x1152x16/2",), ()]
    assert capsys.readouterr().err.count("first step after: 3.0 s") == 2
    few = cases.config_of(Case(**begun[0]["case"]))
    assert few.model.variant == "DiT-3x1152x16/2" and few.training.residual == "bf16"


def test_an_oracle_without_enough_memory_leaves_its_contestants_untimed(here, monkeypatch):
    right = contestant.build_case

    def build(case):
        if case.stack == "oracle":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(case)

    monkeypatch.setattr(contestant, "build_case", build)
    (row,) = compete_here(here, "official", rounds=1)
    assert "CUDA out of memory" in row.failed and not row.rates
    assert names(here.jobs) == [("official", 4), ("oracle", 4)]  # never on half a batch: it is compared image by image


def test_time_that_runs_out_leaves_the_turns_that_were_done(here):
    def perform(job, timeout_s):
        if len(here.jobs) == 4:
            raise TimeoutError("no result")
        return here.perform(job, timeout_s)

    rows = compete_here(Namespace(perform=perform), "fastdit", "official")
    assert [(len(row.rates), row.failed) for row in rows] == [(1, ""), (2, "")]


def test_a_run_writes_table_chart_and_lines(here, monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    memory = "if len(y) > 2: raise torch.OutOfMemoryError('CUDA out of memory. Tried')"
    repo = checkout(tmp_path / "DiT", memory)  # the released network instead of the plain one, in too little memory
    arguments = f"step --size tiny --device cpu --contestants official fastdit --rounds 1 --steps 2 --out {out}"
    monkeypatch.setattr(sys, "argv", [*arguments.split(), "--profile", "--reference-repo", str(repo), "--", *EAGER])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # else set by the program
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    program.main()
    said = capsys.readouterr().out
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert lines == [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    fastdit, official = lines
    assert (official["contestant"], official["batch"], fastdit["batch"]) == ("official", 2, 4)
    for line in lines:
        for key in "images_per_s steps_per_s tflops of_product product_tflops peak_gib first_step_s".split():
            assert line[key] > 0, key
        assert line["spread"][0] <= line["images_per_s"] <= line["spread"][1] and line["steps"] == 2
        assert line["loss_error"] < 1e-2 and line["hardware"] and line["commit"] and line["date"] and line["torch"]
    assert fastdit["over"]["official"] == pytest.approx(1 / official["over"]["fastdit"], rel=0.02)
    assert fastdit["profile_ms"]["GEMM"] > 0 and fastdit["profile_ms"]["gap"] >= 0 and "profile_ms" not in official
    assert 0 < len(fastdit["kernels"]) <= 30 and fastdit["caches"] == "empty"
    assert "predicted_gib" not in fastdit  # the peak beside it is the whole process's on a CPU
    table = (out / "step.md").read_text()
    assert table in said and all(f"**{line['images_per_s']}**" in table for line in lines)
    assert (out / "step.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "step" / "trace-fastdit.json.gz").stat().st_size > 1000


def test_a_wrong_contestant_is_reported_without_a_time(here, monkeypatch, tmp_path, capsys):
    wrong = checkout(tmp_path / "DiT", WRONG["labels"])
    arguments = "step --size tiny --device cpu --rounds 1 --steps 1 --contestants official fastdit --reference-repo"
    monkeypatch.setattr(sys, "argv", [*arguments.split(), str(wrong), "--", *EAGER])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # else set by the program
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    with pytest.raises(SystemExit, match="not every contestant came through: official"):
        program.main()
    said = capsys.readouterr().out
    fastdit, official = (json.loads(line) for line in said.splitlines() if line.startswith("{"))
    assert "computes something else" in official["failed"] and "images_per_s" not in official
    assert fastdit["images_per_s"] > 0 and "official" not in fastdit["over"]
    assert "computes something else" in said.split("| contestant")[1]


def test_a_dying_contestant_is_reported_and_the_others_are_timed(first, tmp_path):
    """The program as a user starts it, with its processes; but the oracle has run before."""
    oracle = {name: getattr(first[1], name).tolist() for name in ("losses", "moved", "drawn")} | {"precision": "fp32"}
    (tmp_path / "truth.json").write_text(json.dumps({"tiny cpu 4": oracle}))
    dying = checkout(tmp_path / "fast-DiT", "import os; os._exit(9)  # checkpoint")
    arguments = "-m bench.step --size tiny --device cpu --rounds 1 --steps 1 --contestants fast-dit fastdit"
    command = [sys.executable, *arguments.split(), "--out", str(tmp_path / "out")]
    command += ["--truth", str(tmp_path / "truth.json"), "--reference-repo", str(dying), "--", *EAGER]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    fastdit, dead = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert "ended with 9" in dead["failed"] and "images_per_s" not in dead
    assert fastdit["images_per_s"] > 0 and "ended with 9" in done.stdout.split("| contestant")[1]
    (file,) = (tmp_path / "out" / "step").iterdir()
    assert file.name == "01-fastdit.json" and len(json.loads(file.read_text())["seconds"]) == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--reference-repo", "no/such"], "holds no models.py"),
        (["model.attenton=eager"], "did you mean 'model.attention'"),
        (["--ablation", "--contestants", "FP8"], "FP8 is unknown; use some of fastdit, bf16 residual stream"),
    ],
)
def test_mistakes_are_said_in_one_line_before_any_work(monkeypatch, arguments, words):
    monkeypatch.setattr(sys, "argv", ["step", "--size", "tiny", *arguments])
    with pytest.raises(SystemExit) as error:
        program.main()
    assert str(error.value).startswith("error: ") and words in str(error.value) and "\n" not in str(error.value)
