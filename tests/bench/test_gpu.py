"""The programs for a GPU: what they write when time, memory or a backend ends early; on one, the graphs' numbers."""

import importlib.util
import json
import re
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers import ROOT

sys.path.append(str(ROOT / "bench"))

import attention  # noqa: E402
import contestants  # noqa: E402
import sample  # noqa: E402
import step  # noqa: E402
from contestants import Case, build_case, cases_of, config_of  # noqa: E402
from gate import gate_errors  # noqa: E402
from workers import Served  # noqa: E402

from fastdit.training.engine import TorchEngine  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """bench/attention.py as on a GPU whose backends take the milliseconds of the returned dict, one a second."""
    backends, now = {"sdpa": 3.0, "sdpa-flash": 2.0, "triton": 4.0}, [0.0]

    def ms(name, shape, deadline, file):
        if now[0] > deadline:
            raise TimeoutError
        now[0] += 1
        return backends.get(name)

    monkeypatch.setattr(attention, "milliseconds", ms)
    monkeypatch.setattr(attention, "MEASURED", tmp_path / "attention.json")
    monkeypatch.setattr(attention.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    monkeypatch.setattr(sys, "argv", ["attention.py"])
    return backends


def test_attentions_table_holds_every_shape_that_was_done_when_time_ended(gpu, monkeypatch, tmp_path):
    (tmp_path / "attention.json").write_text('{"GPU d64 t256": "sdpa", "another": "eager"}')
    each = len(attention.ATTENTION) - 1  # seconds a shape: all backends but the CPU's
    monkeypatch.setattr(sys, "argv", ["attention.py", "--budget-s", str(each + 2)])
    with pytest.raises(SystemExit, match="was used up"):
        attention.main()
    table = json.loads((tmp_path / "attention.json").read_text())
    assert table == {"GPU d72 t256": "sdpa-flash", "GPU d64 t256": "sdpa", "another": "eager"}


def test_the_cpus_attention_is_never_a_gpus(gpu, tmp_path):
    gpu["cpu"] = 0.1
    attention.main()
    table = json.loads((tmp_path / "attention.json").read_text())
    assert len(table) == len(attention.SHAPES) and set(table.values()) == {"sdpa-flash"}


def test_a_backend_that_breaks_is_left_out(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setattr(attention, "obstacle", lambda *args, **kwargs: None)
    file, shape = tmp_path / "results.jsonl", attention.SHAPES[0]
    for wrong in (float("nan"), ImportError("undefined symbol\nand more")):

        def error(*args, wrong=wrong):
            if isinstance(wrong, Exception):
                raise wrong
            return wrong

        monkeypatch.setattr(attention, "error", error)
        assert attention.milliseconds("triton", shape, float("inf"), file) is None
    with pytest.raises(TimeoutError):
        attention.milliseconds("triton", shape, 0.0, file)
    assert [line["skipped"] for line in lines_of(tmp_path)] == ["error nan", "ImportError: undefined symbol"]


def test_an_op_that_fails_and_a_peer_that_is_missing_leave_the_others_their_times(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("bench_kernels", ROOT / "bench/kernels.py")
    kernels = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec.loader.exec_module(kernels)
    import kernels_peers

    def peer():
        raise ImportError("No module named 'liger_kernel'")

    def correct(op, shape):
        if op.name == "swiglu":
            raise RuntimeError("out of resource: shared memory")
        return []

    ops = {name: SimpleNamespace(name=name, real=[(1,)], inputs=lambda *a: {}, minimum_bytes=lambda *a: (1e6, 1e6),
                                 triton=None, eager=lambda: None) for name in ("swiglu", "adaln")}  # fmt: skip
    monkeypatch.setattr(kernels, "OPS", ops)
    monkeypatch.setattr(kernels, "correct", correct)
    monkeypatch.setattr(kernels, "copy_gbps", lambda ms: 1000.0)
    monkeypatch.setattr(kernels, "timed", lambda fn, kwargs, ms: {"forward": (1.0, 1.0, 1.0)})
    monkeypatch.setitem(kernels_peers.PEERS, "adaln", {"liger": peer, "apex": lambda: None})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--out", str(tmp_path)])
    with torch._functorch.config.patch(donated_buffer=True):  # the bench sets it
        assert kernels.main() == 0
    lines = [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines()]
    assert lines[0]["op"] == "swiglu" and "shared memory" in lines[0]["failed"][0]
    assert [line["contestant"] for line in lines[1:]] == ["fastdit", "eager", "compiled", "liger", "apex"]
    assert "liger_kernel" in lines[4]["failed"][0] and lines[5]["ms"] == 1.0


def test_sampling_keeps_what_it_had_time_for_and_what_did_not_fail(monkeypatch, tmp_path):
    """Heun runs out of memory; after the first turn of DPM-Solver++ the time is over, so DDPM is not begun."""
    right, late = sample.Bench.seconds, []
    monkeypatch.setattr(sample.time, "monotonic", lambda: 1000.0 * (len(late) > 3))

    def seconds(self, run, steps, precision):
        late.append(precision)
        return right(self, run, steps, precision)

    def fastdit(self, steps, precision, right=sample.Bench.fastdit):
        if self.whole == 50:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried")
        return right(self, steps, precision)

    monkeypatch.setattr(sample.Bench, "seconds", seconds)
    monkeypatch.setattr(sample.Bench, "fastdit", fastdit)
    arguments = "sample.py --device cpu --size tiny --batch 2 --budget-s 500 --samplings Heun DPM-Solver++ DDPM --out"
    monkeypatch.setattr(sys, "argv", [*arguments.split(), str(tmp_path)])
    with pytest.raises(SystemExit, match="Heun CUDA out of memory.; DDPM was not begun"):
        sample.main()
    lines = lines_of(tmp_path)
    assert {(line["sampler"], line["turns"]) for line in lines} == {("DPM-Solver++", 1)} and len(lines) == 3
    assert (tmp_path / "sample.md").read_text().count("DPM-Solver++") == 3


@pytest.fixture
def here(monkeypatch):
    """bench/step.py's workers within this process; the list says what was asked, of whom."""
    asked = []

    class Here(Served):
        def ask(self, method, *arguments, timeout_s):
            if method in ("gate", "build"):
                self.case = arguments[0]
            asked.append((self.case.name, method))
            return getattr(self, method)(*arguments)

        def close(self):
            self.contestant = None

    monkeypatch.setattr(step, "Worker", Here)
    with torch._dynamo.config.patch(automatic_dynamic_shapes=True):  # as it was, afterwards
        yield asked


def compete(*names: str, **options) -> list[step.Row]:
    eager = ("training.compile=false",)
    cases = [
        Case(name, "fastdit" if "fastdit" in name else name, "tiny", 4, "cpu", eager if "fastdit" in name else ())
        for name in names
    ]
    options = {"turns": 2, "steps": 1, "warmup": 0, "resident": False, "budget_s": 600, "profile": True, **options}
    return step.compete(cases, **options)


def test_the_first_contestant_too_halves_its_batch_and_the_others_take_the_same(here, monkeypatch):
    right = TorchEngine.__call__

    def call(self, x, t, y):
        if len(y) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return right(self, x, t, y)

    monkeypatch.setattr(TorchEngine, "__call__", call)
    rows = compete("official", "fastdit")
    assert [(row.case.name, row.gated.batch, row.failed, len(row.turns)) for row in rows] == [
        ("official", 2, "", 2), ("fastdit", 2, "", 2)
    ]  # fmt: skip
    assert rows[0].errors[0] < 1e-5 < rows[1].errors[0] < 4e-3
    assert here[:6] == [("fastdit", "gate"), ("fastdit", "release"), ("oracle", "gate"), ("fastdit", "build"),
                        ("fastdit", "turn"), ("fastdit", "peak_gib")]  # fmt: skip
    assert here.count(("oracle", "gate")) == 1


def test_a_contestant_goes_from_its_gate_to_its_first_turn_and_profile(here):
    rows = compete("official", "fastdit")
    assert all(row.profile and len(row.turns) == 2 for row in rows)
    turn = ["turn", "peak_gib", "product_tflops", "profile"]
    assert [method for name, method in here if name == "fastdit"] == ["gate", "release", *turn, "build", *turn[:-1]]
    assert here.index(("fastdit", "profile")) < here.index(("official", "gate"))


def test_a_profiler_that_fails_costs_no_turn(here, monkeypatch):
    def profile(self, steps, trace):
        raise RuntimeError("CUPTI")

    monkeypatch.setattr(Served, "profile", profile)
    rows = compete("fastdit", turns=1)
    assert not rows[0].failed and rows[0].rates and not rows[0].profile


def test_an_oracle_too_large_to_stand_beside_a_contestant_runs_alone(here, monkeypatch):
    right, tries = Served.gate, []

    def gate(self, case):
        tries.append(case.name)
        if tries.count("oracle") == 1 and case.name == "oracle":
            raise MemoryError("CUDA out of memory")
        return right(self, case)

    monkeypatch.setattr(Served, "gate", gate)
    rows = compete("fastdit", turns=1)
    assert tries == ["fastdit", "oracle", "oracle"] and rows[0].rates
    assert [method for name, method in here if name == "fastdit"][:4] == ["gate", "release", "build", "turn"]


def test_all_on_is_a_contestant_of_its_own_and_has_no_graph_on_a_cpu():
    common = dict(size="XL/2", batch=None, override=["model.attention=sdpa"], reference_repo=[], ablation=False,
                  engines=False, contestants=["fastdit", "fastdit-all-on", "strong"])  # fmt: skip
    plain, on, strong = cases_of(Namespace(device="cuda", **common))
    assert plain.overrides == ("model.attention=sdpa",) and not strong.overrides
    settings = config_of(on).training
    assert settings.cuda_graph and settings.residual == "bf16" and on.stack == "fastdit"
    assert config_of(on).model.attention == "sdpa" and config_of(replace(on, overrides=())).model.attention == "auto"
    on_cpu = config_of(cases_of(Namespace(device="cpu", **common))[1]).training
    assert on_cpu.residual == "bf16" and not on_cpu.cuda_graph
    # a bf16 stream keeps 4 bytes a value less in each of 28 blocks, 256 images of 256 tokens, and 2 at the end
    saved = step.predicted_gib(plain, 256) - step.predicted_gib(on, 256)
    assert saved == pytest.approx(256 * 256 * 1152 * (28 * 4 + 2) / 2**30)


@pytest.mark.parametrize("installed", [True, False])
def test_engines_whose_package_is_missing_are_left_out_in_one_line(installed, monkeypatch, capsys):
    monkeypatch.setattr(contestants.importlib.util, "find_spec", lambda name: object() if installed else None)
    asked = Namespace(device="cpu", size="tiny", batch=None, override=[], reference_repo=[], ablation=False,
                      engines=True, contestants=[])  # fmt: skip
    names = [case.name for case in cases_of(asked)]
    zero = ["ZeRO-1", "ZeRO-2", "ZeRO-3, no compile"]
    assert names == ["fastdit", "DDP", *zero * installed, "no compile"]
    said = capsys.readouterr().err
    assert said == ("" if installed else f"{', '.join(zero)}: left out, deepspeed is not installed\n")


def test_the_time_limits_of_a_call_stay_under_nine_minutes():
    script = (ROOT / "bench/gpu.sh").read_text()
    words = re.findall(r"LIMIT=\((attention 60 [^)]*)\)", script)[0].split()
    limits = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    parts = re.search(r"PARTS=\((attention [^)]*)\)", script)[1].split()
    assert sum(limits[part] for part in parts) == 535 and "at most 535 s" in script
    assert limits["ablation"] < 540 and limits["small-batch"] + limits["engines"] < 540
    for file, name in re.findall(r"(tests/[\w/]*test_\w+\.py)(?:::(\w+))?", script):
        assert f"def {name}" in (ROOT / file).read_text(), (file, name)


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_a_gpu
def test_a_network_built_on_the_gpu_has_the_same_tables():
    for overrides in ((), ("model.position=rope",)):
        ours, wanted = (
            dict(build_case(Case("fastdit", "fastdit", "tiny", 4, device, overrides)).model.named_buffers())
            for device in ("cuda", "cpu")
        )
        assert ours.keys() == wanted.keys() and len(ours)
        for name, buffer in ours.items():
            assert buffer.is_cuda
            torch.testing.assert_close(buffer.cpu(), wanted[name], atol=1e-6, rtol=1e-6)


@on_a_gpu
@pytest.mark.parametrize("compiled", ["true", "false"])
@pytest.mark.parametrize("residual", ["fp32", "bf16"])
def test_a_graphed_step_is_the_step_that_it_captured(compiled, residual):
    """Images, labels, seed and learning rate are other ones at every step (bench/gate.py)."""
    common = (f"training.compile={compiled}", f"training.residual={residual}")
    graphed, plain = (
        build_case(Case("fastdit", "fastdit", "tiny", 4, "cuda", (*common, f"training.cuda_graph={graph}"))).gate()
        for graph in ("true", "false")
    )
    losses, ways = gate_errors(graphed, plain)
    assert losses < 1e-3 and ways < 0.05


@on_a_gpu
@pytest.mark.parametrize("precision, most", [("fp32", sample.TOLERANCE["cuda"]), ("bf16", 0.05)])
def test_a_graphed_evaluation_is_the_networks(precision, most):
    bench = sample.Bench("DDPM", "tiny", 2, torch.device("cuda"), ())
    truth = bench.reference(sample.GATE_STEPS, "fp32")
    assert sample.difference(bench.fastdit(sample.GATE_STEPS, precision), truth) < most
    assert bench.inferences[precision].graphs


@on_a_gpu
@pytest.mark.parametrize("policy", ["none", "activation", "selective"])
def test_predicted_memory_is_within_a_tenth_of_the_peak(policy):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    case = Case("peak", "fastdit", "B/2", 64, "cuda", (f"training.activation_checkpointing={policy}",))
    bench = build_case(case)
    for i in range(3):
        torch.cuda.reset_peak_memory_stats()  # of a step when all has been compiled
        bench.step(i)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    assert peak == pytest.approx(step.predicted_gib(case, 64), rel=0.1)
