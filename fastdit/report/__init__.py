"""`fastdit report`: one HTML file about runs. facts.py reads them, measure.py samples, page.py writes.

autoencoder.py writes the page of runs of `fastdit train-vae`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from fastdit.build import build_objective, check_sampling
from fastdit.config import config_from, to_tree
from fastdit.errors import output_file
from fastdit.files import replace_text
from fastdit.report import autoencoder
from fastdit.report.facts import of_autoencoder, read_run
from fastdit.report.measure import FEW, measure_run
from fastdit.report.page import render
from fastdit.sampling import check_settings

BUDGET_S = 30  # for the samples and losses that are made when training ends


def write_report(
    runs: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    title: str = "",
    device: torch.device | str = "cpu",
    overrides: Iterable[str] = (),
    budget_s: float = float("inf"),
) -> Path:
    """Write the page of one run, or of up to four side by side, and return its path.

    `out`: by default RUN/report.html; for several runs report.html in the working directory. `overrides` of the
    settings of the samples. What is predicted to take longer than `budget_s` is left out. ValueError for a folder that
    is not a run; whatever else is missing is left out, and the page says so.
    """
    if not 1 <= len(runs) <= 4:
        raise ValueError(f"a report shows one to four runs, not {len(runs)}; name fewer")
    facts, overrides = [read_run(run) for run in runs], list(overrides)
    autoencoders = [run for run in facts if of_autoencoder(run)]
    if autoencoders and len(autoencoders) < len(facts):
        raise ValueError(f"{autoencoders[0].folder} is a run of fastdit train-vae, others are of fastdit train; make a "
                         "report of each kind")  # fmt: skip
    if autoencoders and overrides:
        raise ValueError(f"{overrides[0]} is a setting of samples, and {facts[0].folder} is a run of train-vae; "
                         "leave it out")  # fmt: skip
    if not autoencoders and overrides:
        check_settings(overrides, but=["sampling.batch_size"])
        for run in facts:  # a mistake ends the command, instead of becoming a note on the page
            config = config_from(to_tree(run.config), run.folder, [*FEW, *overrides])
            guided = config.model.class_dropout and config.data.num_classes
            check_sampling(config, build_objective(config), 0 if guided else None)
    out = out or (facts[0].folder / "report.html" if len(runs) == 1 else "report.html")
    out = output_file(out, "--out", ".html")
    if autoencoders:
        page = autoencoder.render(facts, title)
    else:
        measured = [measure_run(run, torch.device(device), overrides, budget_s) for run in facts]
        page = render(facts, measured, title)
    replace_text(out, page)
    return out


def report_at_end(run_dir: Path, device: torch.device) -> str:
    """Write the report of a run that has just ended; returns the line to log, a warning if it failed."""
    try:
        return f"report {write_report([run_dir], device=device, budget_s=BUDGET_S)}"
    except Exception as error:  # the training is complete: nothing here may make it look as if it had failed
        reason = " ".join(str(error).split())
        return f"warning: no report ({type(error).__name__}: {reason}); try again with fastdit report {run_dir}"
