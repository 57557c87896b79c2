"""`python -m bench.io.evaluate`: a row for each feature network, and one for each metric that the count allows."""

import json
import sys

import pytest

from bench.io import evaluate
from fastdit.evaluation.features import FEATURES
from fastdit.evaluation.metrics import METRICS
from helpers.evaluation import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_network_and_metric_gets_a_row(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(FEATURES, "efficientnet-lite0", tiny)
    monkeypatch.setattr(evaluate, "DIM", 20)
    monkeypatch.setattr(evaluate, "ProcessPoolExecutor", Here)
    arguments = ["--images", "8", "--size", "16", "--count", "20", "--features", "efficientnet-lite0"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments, "--out", str(tmp_path)])
    evaluate.main()
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert lines[0]["size"] == 16 and lines[0]["images_per_s"] > 0 and lines[0]["process_peak_gib"] > 0.1
    assert [line["metric"] for line in lines[1:]] == [name for name in METRICS if name != "frechet_infinity"]
    assert "frechet_infinity: it needs 30 samples or more to extrapolate from, not 20" in capsys.readouterr().err


class Here:
    """An executor that calls the function in this process, which saves the start of another."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        self.result = lambda: function(*arguments)
        return self
