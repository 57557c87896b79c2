"""`python -m bench.io.extract`: a row for each way, and what was measured is kept when the time is over."""

import json
import sys

import pytest

from bench.io import extract
from fastdit.data.latents import LatentCodec

pytestmark = pytest.mark.usefixtures("one_thread", "any_cpu")


def measured(monkeypatch, out, *arguments: str) -> dict[str, dict]:
    monkeypatch.setattr(sys, "argv", ["extract", "--count", "12", "--out", str(out), *arguments])
    monkeypatch.setattr(extract.signal, "signal", lambda *_: None)
    extract.main()
    return {line["way"]: line for line in map(json.loads, (out / "results.jsonl").read_text().splitlines())}


def test_each_way_gets_a_row_and_bf16_what_it_costs(monkeypatch, tmp_path):
    load = LatentCodec.load
    lines = measured(monkeypatch, tmp_path, "--rounds", "2", "--ways", "fastdit-fp32", "fastdit-bf16", "loader")
    assert LatentCodec.load == load and list(lines) == ["fastdit-fp32", "fastdit-bf16", "loader"]
    table = (tmp_path / "extract.md").read_text()
    for line in lines.values():
        assert (line["rounds"], line["images"]) == (2, 12) and f"**{line['images_per_s']}**" in table
    assert 30 < lines["fastdit-bf16"]["fp32_psnr_db"] < 70 and "fp32_psnr_db" not in lines["fastdit-fp32"]
    assert lines["loader"]["over"]["fastdit-fp32"] > 0 and lines["fastdit-bf16"]["setup_s"] >= 0


def test_the_parts_alone_are_compared_with_the_whole(monkeypatch, tmp_path):
    ways = ["fastdit-fp32", *extract.PARTS]
    lines = measured(monkeypatch, tmp_path, "--rounds", "1", "--cpu-time", "--ways", *ways)
    whole, found = lines["fastdit-fp32"]["images_per_s"], lines["fastdit-fp32 of its parts"]
    parts = [lines[name]["images_per_s"] for name in extract.PARTS]
    assert found["of_slowest_part"] == pytest.approx(whole / min(parts), rel=0.01)
    assert found["of_parts_in_turn"] == pytest.approx(whole * sum(1 / part for part in parts), rel=0.01)
    assert extract.extract.extract_share is extract.encode.extract_share and found["clock"] == "process_time"


def test_what_was_measured_is_kept_when_the_time_is_over(monkeypatch, tmp_path):
    ran, right = [], extract.plain
    monkeypatch.setattr(extract, "plain", lambda *a: ran.append(right(*a)))
    monkeypatch.setattr(extract.time, "monotonic", lambda: 1000.0 * len(ran))
    with pytest.raises(SystemExit, match="not timed, the budget was used up: fastdit-fp32"):
        measured(monkeypatch, tmp_path, "--budget-s", "500", "--ways", "loader", "fastdit-fp32")
    [line] = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert (line["way"], line["rounds"]) == ("loader", 1)


def test_a_failed_compilation_is_not_reported_as_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(LatentCodec, "faster", lambda *_: "RuntimeError: no compiler")
    with pytest.raises(RuntimeError, match="runs without torch.compile"):
        measured(monkeypatch, tmp_path, "--ways", "fastdit-bf16-compiled")
