"""`python -m bench.sample`: both sides make the same latents, and one that fails or has no time costs no other."""

import json
import sys

import pytest
import torch

from bench.sample import __main__ as sample

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", sample.SAMPLINGS)
def test_both_samplings_make_the_same_latents(name):
    bench = sample.Bench(name, "tiny", 2, torch.device("cpu"), ())
    truth = bench.reference(sample.GATE_STEPS, "fp32")
    assert sample.difference(bench.fastdit(sample.GATE_STEPS, "fp32"), truth) < 1e-5
    assert 1e-5 < sample.difference(bench.fastdit(sample.GATE_STEPS, "bf16"), truth) < 0.05
    assert sample.difference(bench.fastdit(sample.GATE_STEPS + 1, "fp32"), truth) > sample.TOLERANCE["cpu"]


def test_sampling_that_differs_is_not_timed(monkeypatch, tmp_path, capsys):
    right = sample.Bench.fastdit
    monkeypatch.setattr(sample.Bench, "fastdit", lambda self, *a: right(self, *a) * (1.01 if self.whole == 50 else 1))
    arguments = f"sample --device cpu --size tiny --batch 2 --rounds 1 --samplings Heun DPM-Solver++ --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", arguments.split())
    with pytest.raises(SystemExit, match="Heun differs"):
        sample.main()
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {line["sampler"] for line in lines} == {"DPM-Solver++"} and {line["contestant"] for line in lines} == {
        "plain, fp32", "plain, bf16", "fastdit"
    }  # fmt: skip
    for line in lines:
        assert line["images_per_s"] > 0 and (line["steps"], line["steps_timed"]) == (20, 4)
        assert f"**{line['images_per_s']}**" in (tmp_path / "sample.md").read_text()


def test_sampling_keeps_what_it_had_time_for_and_what_did_not_fail(monkeypatch, tmp_path):
    """Heun runs out of memory; after the first round of DPM-Solver++ the time is over, so DDPM is not started."""
    right, late = sample.Bench.rate, []
    monkeypatch.setattr(sample.time, "monotonic", lambda: 1000.0 * (len(late) > 3))

    def rate(self, run, steps, precision):
        late.append(precision)
        return right(self, run, steps, precision)

    def fastdit(self, steps, precision, right=sample.Bench.fastdit):
        if self.whole == 50:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried")
        return right(self, steps, precision)

    monkeypatch.setattr(sample.Bench, "rate", rate)
    monkeypatch.setattr(sample.Bench, "fastdit", fastdit)
    arguments = "sample --device cpu --size tiny --batch 2 --budget-s 500 --samplings Heun DPM-Solver++ DDPM --out"
    monkeypatch.setattr(sys, "argv", [*arguments.split(), str(tmp_path)])
    with pytest.raises(SystemExit, match="Heun CUDA out of memory.; DDPM was not started"):
        sample.main()
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {(line["sampler"], line["rounds"]) for line in lines} == {("DPM-Solver++", 1)} and len(lines) == 3
    assert (tmp_path / "sample.md").read_text().count("DPM-Solver++") == 3
