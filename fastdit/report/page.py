"""The HTML page: one file, with everything in it, that needs neither scripts nor a network."""

import html
import math
from collections.abc import Sequence
from datetime import timedelta
from importlib.resources import files

import numpy as np

from fastdit import __version__
from fastdit.data.images import size_text
from fastdit.errors import counted
from fastdit.evaluation.loss import BINS, IMAGES
from fastdit.evaluation.protocol import rough
from fastdit.evaluation.protocol import title as title_of
from fastdit.report.facts import Run, reproduce, settings_of, warnings
from fastdit.report.measure import Measured
from fastdit.report.pictures import Series, animation, picture, plot, png, short, smoothed
from fastdit.schema import shards_text
from fastdit.sheets import told_apart
from fastdit.training.monitor import FOLDER
from fastdit.training.sheets import read_png

RECORDED = ("step", "loss", "grad_norm", "lr", "steps_per_s", "images_per_s", "mfu", "peak_gib", "time")
COLUMNS = 4  # of a sheet of samples
SMOOTHED = "Faint: as recorded; strong: the mean over 5% of the run around each step."


def render(runs: Sequence[Run], measured: Sequence[Measured], title: str = "") -> str:
    """The page of one run, or of several side by side."""
    names = unique_names(runs)
    title = title or " and ".join(names)
    pairs = list(zip(runs, measured, strict=True))
    body = [
        f"<header><h1>{text(title)}</h1>{side_by_side(names, [head(*pair) for pair in pairs])}</header>",
        section("Quality", table(names, [quality(run) for run in runs])),
        section("Samples", side_by_side(names, [samples(m) for m in measured])),
        section("Samples over training", side_by_side(names, [strips(*pair) for pair in pairs])),
        section("Nearest training images", side_by_side(names, [neighbors(m) for m in measured])),
        section("Training", curves(runs, measured)),
        section("What was trained on what", table(names, [about(*pair) for pair in pairs])),
        section("What differs", table(names, differences(runs))) if len(runs) > 1 else "",
        section("Where it ran", table(names, [places(run) for run in runs])),
        section("To reproduce it", side_by_side(names, [recipe(run, len(runs) == 1) for run in runs])),
        section("Not on this page", side_by_side(names, [notes(run, *m.notes) for run, m in pairs])),
    ]
    return document(title, body)


def document(title: str, body: Sequence[str]) -> str:
    """The whole page with these parts, of which empty ones are left out."""
    style = (files("fastdit.report") / "page.css").read_text()
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title>\n<style>\n{style}</style></head>\n<body>\n"
        + "\n".join(filter(None, body))
        + f"\n<p class=\"muted\"><small>fastdit {__version__}</small></p>\n</body>\n</html>\n"
    )


def text(value: object) -> str:
    return html.escape(str(value))


def unique_names(runs: Sequence[Run]) -> list[str]:
    """The name of each run's folder, with as many of the folders above as tell the runs apart."""
    most = max(len(run.folder.parts) for run in runs)
    return told_apart(lambda depth: ["/".join(run.folder.parts[-depth:]) for run in runs], 1, most)


def section(heading: str, content: str) -> str:
    return f"<section><h2>{heading}</h2>\n{content}\n</section>" if content else ""


def side_by_side(names: list[str], parts: list[str]) -> str:
    """One part as it is; several in columns, or below each other on a narrow screen; "" if all are empty."""
    if len(parts) == 1 or not any(parts):
        return "".join(parts)
    columns = (
        f'<div><h3 class="dot s{i}">{text(name)}</h3>{part or missing}</div>'
        for i, (name, part) in enumerate(zip(names, parts, strict=True))
        for missing in ('<p class="muted">none</p>',)
    )
    return f'<div class="runs">{"".join(columns)}</div>'


def table(names: list[str], columns: list[dict]) -> str:
    """A row per key, a string or (string, remark), and a column per run; "" where there is nothing to show."""
    rows = ""
    for key in dict.fromkeys(key for column in columns for key in column):
        name, remark = key if isinstance(key, tuple) else (key, "")
        cells = "".join(f"<td>{text(column.get(key, '-'))}</td>" for column in columns)
        rows += f"<tr><th>{text(name)}{f'<small>{text(remark)}</small>' * bool(remark)}</th>{cells}</tr>"
    heads = "".join(f'<th class="dot s{i}">{text(name)}</th>' for i, name in enumerate(names))
    heading = f"<thead><tr><th></th>{heads}</tr></thead>" if len(columns) > 1 else ""
    kinds = " ".join(["many"] * (len(columns) > 1) + ["remarks"] * ("<small>" in rows))
    return f'<table class="{kinds}">{heading}<tbody>{rows}</tbody></table>' if rows else ""


def head(run: Run, measured: Measured) -> str:
    """What it is in a sentence, the main figures, and the warnings."""
    data = run.config.data
    epochs = f" ({counted(run.epochs, 'epoch', spec='.3g')})" if run.epochs else ""
    size = f" with {short(measured.parameters)} parameters" if measured.parameters else ""
    images = counted(len(run.manifest), "image") if run.manifest else "images"
    classes = f" of {counted(data.num_classes, 'class', 'classes')}" if data.num_classes else ", without labels,"
    lead = (
        f"{run.config.model.variant}{size}, trained with {kind(run)} on {images}{classes} at "
        f"{size_text(data.image_size)} px for {counted(run.steps, 'step')}{epochs}."
    )
    _, losses = run.curve("loss")
    losses = losses[-math.ceil(len(losses) / 20) :]
    tiles = {"loss, last 5%": figure(np.nanmean(losses))} if np.isfinite(losses).any() else {}
    return opening(run, lead, tiles)


def figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def opening(run: Run, lead: str, figures: dict[str, str]) -> str:
    """A sentence, the main figures between the training's time and its rates, and the warnings."""
    tiles = {"training time": str(timedelta(seconds=round(run.seconds)))} if run.metrics else {}
    tiles |= figures
    for key, name, unit, many in (
        ("images_per_s", "images/s, median", "", np.nanmedian),
        ("peak_gib", "peak memory", " GiB", np.nanmax),
    ):
        values = run.curve(key)[1]
        if np.isfinite(values).any():
            tiles[name] = figure(many(values)) + unit
    shown = "".join(f"<div><dt>{text(key)}</dt><dd>{text(value)}</dd></div>" for key, value in tiles.items())
    found = "".join(f"<li>{text(line)}</li>" for line in warnings(run))
    return (
        f'<p class="lead">{text(lead)}</p>'
        + (f'<dl class="tiles">{shown}</dl>' if tiles else "")
        + (f'<ul class="warnings" aria-label="warnings">{found}</ul>' if found else "")
    )


def kind(run: Run) -> str:
    return {"flow": "flow matching", "ddpm": "DDPM"}.get(run.config.objective.name, run.config.objective.name)


def quality(run: Run) -> dict[tuple[str, str], str]:
    """The figures of quality.json by name and protocol, and those of the last validation and evaluation."""
    figures = [(figure["name"], figure.get("protocol", ""), figure["value"]) for figure in run.quality]
    if losses := [m for m in run.measured if isinstance(m.get("val_loss"), float)]:
        about = f"of the EMA at step {losses[-1]['step']:,}, on images that the run held out"
        figures.append(("validation loss", about, losses[-1]["val_loss"]))
    if run.evaluations:
        last = run.evaluations[-1]
        values = {name: value for name, value in last["values"].items() if isinstance(value, float)}
        for name, value in values.items():
            if not name.endswith("_error"):
                error = f" ± {short(values[f'{name}_error'])}" if f"{name}_error" in values else ""
                about = "the same samples" if figures and figures[-1][1] in (protocol(last), "the same samples") else ""
                error += " (rough)" if rough(name, last) else ""
                figures.append((title_of(name, {"distance": str(last.get("distance"))}), about or protocol(last),
                                short(value) + error))  # fmt: skip
        real = last.get("real")
        if "frechet" in values and isinstance(real, dict) and isinstance(real.get("frechet"), float):
            counts = f"{real.get('num_images')} against {real.get('reference_images')} images"
            figures.append(("real against real", counts, short(real["frechet"])))
    return {(name, about): short(value) if isinstance(value, float) else str(value) for name, about, value in figures}


def protocol(result: dict) -> str:
    """How an evaluation was made, from a line of evaluations.jsonl."""
    made = result["protocol"]
    parts = [made.get("samples"), made.get("reference")]
    samples, reference = (part if isinstance(part, dict) else {} for part in parts)
    sampling = samples.get("sampling") if isinstance(samples.get("sampling"), dict) else {}
    name = sampling.get("sampler")
    name = name.get("name") if isinstance(name, dict) else name
    return (f"{made.get('num_images')} samples of step {result['step']:,}, {samples.get('weights')}, {name}, "
            f"{sampling.get('steps')} steps, guidance {sampling.get('cfg_scale')}, seed {samples.get('seed')}, against "
            f"{reference.get('images')} real images")  # fmt: skip


def samples(measured: Measured) -> str:
    if measured.samples is None:
        return ""
    figures = [("Generated", picture(measured.samples, COLUMNS, "generated images"))]
    if measured.real is not None:
        figures.append(("Real", picture(measured.real, COLUMNS, "real images")))
    moving = animation(measured.frames, COLUMNS, "the generated images, from noise to data")
    figures.append(("From noise to data", moving))
    shown = "".join(f"<figure><figcaption>{title}</figcaption>{image}</figure>" for title, image in figures)
    names = list(dict.fromkeys(measured.labels))
    classes = f"Classes, row by row: {', '.join(measured.name(label) for label in names)}" + (
        ", and again. " if len(names) < len(measured.labels) else ". "
    )
    about = (
        f"Generated: not chosen by hand, with {measured.sampling}. "
        + ("Real: training images, as the autoencoder decodes them. " if measured.real is not None else "")
        + (classes if len(measured.names) > 1 else "")
    )
    return f'<div class="three">{shown}</div><p class="muted">{text(about)}</p>'


def strips(run: Run, measured: Measured) -> str:
    shown = ""
    if len(measured.strips) > 1:
        for step, images in measured.strips:
            row = picture(images, len(images), f"samples of step {step}")
            shown += f'<div class="strip"><span>step {step:,}</span>{row}</div>'
        shown += '<p class="muted">The same noise and classes, sampled from each of these checkpoints.</p>'
    if (during := read_png(run.folder / FOLDER / "strip.png")) is not None:
        used = run.config.sampling
        shown += (f'{png(during, "samples made during training")}<p class="muted">Made during training with the EMA: '
                  f"{text(used.sampler.name)}, {text(used.steps)} steps, guidance {used.cfg_scale:g}.</p>")  # fmt: skip
    return shown


def neighbors(measured: Measured) -> str:
    if not measured.neighbors:
        return ""
    figures = "".join(
        f"<figure><figcaption>{text(measured.name(n.label))} "
        f"<span>distances {', '.join(f'{d:.2f}' for d in n.distances)}</span></figcaption>"
        f'<div class="near">{picture(n.images[:1], 1, "a generated image")}'
        f'{picture(n.images[1:], len(n.images) - 1, "its nearest training images")}</div></figure>'
        for n in measured.neighbors
    )
    real = measured.between_real
    about = (
        "Left a generated image, right the training images whose latents are nearest to its own. The distance is the "
        f"root mean square difference of the latents, as it is or mirrored, to up to {measured.searched:,} training "
        f"images{' of its class' if len(measured.names) > 1 else ''}"
        + (f"; from a training image to the nearest other it is {real:.2f} (median)" if math.isfinite(real) else "")
        + ". A copy would be far below that. It is no measure of what a viewer sees."
    )
    return f'<div class="pairs">{figures}</div><p class="muted">{text(about)}</p>'


def curves(runs: Sequence[Run], measured: Sequence[Measured]) -> str:
    losses = [series for i, run in enumerate(runs) for series in both(i, *run.curve("loss"))]
    validation = [Series(*run.curve("val_loss"), i, dashed=True) for i, run in enumerate(runs)]
    validation = [series for series in validation if len(series.x)]
    losses += validation
    plots = [plot("Loss", losses), plot("Loss, logarithmic", losses, log=True)]
    parts = dict.fromkeys(key for run in runs for m in run.metrics for key in m if key not in RECORDED)
    for key in parts:
        plots.append(plot(f"Loss: {key}", [s for i, run in enumerate(runs) for s in both(i, *run.curve(key))]))
    times = (np.arange(BINS) + 0.5) / BINS
    bins = [
        Series(times, np.array(m.bins)[:, 0], i, error=np.array(m.bins)[:, 1])
        for i, m in enumerate(measured)
        if m.bins
    ]
    held_out = [
        Series(times, np.array(values, float), i, dashed=True)
        for i, run in enumerate(runs)
        for values in [m["val_bins"] for m in run.measured if isinstance(m.get("val_bins"), list)][-1:]
        if len(values) == BINS and all(isinstance(value, float | None) for value in values)
    ]
    plots.append(plot("Loss per timestep", bins + held_out, x_label="t (1 is noise)", zero=True))
    distances = [Series(*run.curve("eval_frechet"), i) for i, run in enumerate(runs)]
    names = {str(run.evaluations[-1].get("distance")) for run in runs if run.evaluations}
    plots.append(plot(" and ".join(sorted(names)), distances, zero=True))
    shown = "".join([*plots, *rates(runs)])
    about = SMOOTHED
    about += " Dashed: the EMA on images that the run held out." if validation or held_out else ""
    if bins:
        images = min(IMAGES, *(len(run.manifest) for run, m in zip(runs, measured, strict=True) if m.bins))
        about += (f" The loss per timestep is of the last checkpoint, on {images:,} training images in {BINS} bins; "
                  "the band is the standard error.")  # fmt: skip
    return f'<div class="plots">{shown}</div><p class="muted">{about}</p>' if shown else ""


def rates(runs: Sequence[Run]) -> list[str]:
    """The plots of what any training records beside its losses."""
    plots = [plot("Gradient norm", [s for i, run in enumerate(runs) for s in both(i, *run.curve("grad_norm"))],
                  zero=True)]  # fmt: skip
    titles = {"lr": "Learning rate", "images_per_s": "Images per second", "peak_gib": "Peak memory in GiB"}
    for key, title in titles.items():
        plots.append(plot(title, [Series(*run.curve(key), i) for i, run in enumerate(runs)], zero=True))
    return plots


def both(color: int, x: np.ndarray, y: np.ndarray) -> list[Series]:
    """A curve as it is, faint, and smoothed."""
    return [Series(x, y, color, faint=True), Series(x, smoothed(y), color)]


def about(run: Run, measured: Measured) -> dict[str, str]:
    config, settings = run.config, run.config.training
    objective = ", ".join([kind(run), *(f"{k}={v}" for k, v in config.objective.options.items())])
    rows = {"network": config.model.variant + (f", {measured.parameters:,} parameters" if measured.parameters else "")}
    rows["objective"] = objective
    if run.manifest:
        shape = " x ".join(map(str, run.manifest.latents.shape))
        count = run.manifest.num_classes
        classes = f"of {counted(count, 'class', 'classes')}" if count else "without classes"
        rows["data"] = f"{counted(len(run.manifest), 'image')} {classes} in {shards_text(config.data.shards)}"
        spec = run.manifest.latents
        encoded = f"of {size_text(spec.image_size)} px images through {config.data.vae}"
        rows["latents"] = f"{shape}, {'the pixels themselves' if spec.are_pixels else encoded}"
    else:
        rows["data"] = shards_text(config.data.shards)
    rows |= optimization(run)
    rows["precision"] += ", fp8" * settings.fp8
    return rows


def optimization(run: Run) -> dict[str, str]:
    """How any training was done."""
    config, settings = run.config, run.config.training
    schedule = settings.lr_schedule.name
    schedule += f" after {counted(settings.warmup_steps, 'step')} of warmup" if settings.warmup_steps else ""
    decay = f", weight decay {settings.weight_decay:g}" if settings.weight_decay else ""
    muon = getattr(settings, "optimizer", "") == "muon"  # an autoencoder has no such key
    optimizer = "Muon for the matrices of the blocks, AdamW for the rest" if muon else "AdamW"
    rows = {
        "optimizer": f"{optimizer}, learning rate {settings.lr:g}, {schedule}{decay}",
        "batch": f"{counted(settings.global_batch, 'image')}, "
        + ("mirrored at random" if config.data.hflip else "not mirrored"),
        "precision": settings.precision,
        "EMA": f"decay {settings.ema_decay:g}" + ", with warmup" * settings.ema_warmup,
        "steps": f"{run.steps:,} of {settings.steps:,}"
        + (f", {counted(run.epochs, 'epoch', spec='.3g')}" if run.epochs else ""),
        "seed": str(config.seed),
    }
    return rows | ({"started from": settings.init_from} if settings.init_from else {})


def differences(runs: Sequence[Run]) -> list[dict[str, str]]:
    """The settings that are not the same in all runs."""
    trees = [settings_of(run) for run in runs]
    keys = dict.fromkeys(key for tree in trees for key in tree)
    differing = [key for key in keys if key != "run_dir" and len({tree.get(key) for tree in trees}) > 1]
    return [{key: tree[key] for key in differing if key in tree} for tree in trees]


def places(run: Run) -> dict[str, str]:
    if not run.starts:
        return {}
    rows, last = {}, run.starts[-1]
    for start in run.starts:
        key = f"from step {start['step']:,}" if len(run.starts) > 1 else "hardware"
        many = f"{start['processes']} x " * (start["processes"] > 1)
        nodes = f" on {start['nodes']} nodes" * (start["nodes"] > 1)
        rows[key] = f"{many}{start['hardware']}{nodes}, {start['date']}"
    rows["versions"] = ", ".join(f"{name} {number}" for name, number in last["versions"].items() if number)
    rows["commit"] = (last["commit"] or "unknown").replace("+", ", with changes")
    return rows | {"platform": last["platform"]}


def recipe(run: Run, with_settings: bool) -> str:
    shown = f"<pre>{text(reproduce(run))}</pre>"
    shown += f"<p>It was started as</p><pre>{text(run.starts[0]['command'])}</pre>" if run.starts else ""
    if with_settings:
        settings = "\n".join(f"{key} = {value}" for key, value in settings_of(run).items())
        shown += f'<p>All settings, as in config.yaml:</p><pre class="settings">{text(settings)}</pre>'
    return shown


def notes(run: Run, *more: str) -> str:
    lines = [*run.notes, *more]
    if not run.starts:
        lines.append("No hardware, versions and commit: the run has no environment.jsonl.")
    return f"<ul>{''.join(f'<li>{text(line)}</li>' for line in lines)}</ul>" if lines else ""
