"""The lines, the table and the chart of `python -m bench.step`."""

import statistics
from dataclasses import replace
from pathlib import Path

import torch

from bench.record import compared, markdown, significant
from bench.step.cases import CONTESTANTS, SIZES, Case, config_of
from bench.step.contest import Row
from fastdit.build import build_network, build_objective
from fastdit.cards import GIB, card_of
from fastdit.memory import RESERVED, memory_by_kind
from fastdit.models.dit import DiT


def meta_network(case: Case) -> DiT:
    config = config_of(case)
    with torch.device("meta"):
        return build_network(config, SIZES[case.size].latent_shape, build_objective(config))


def predicted_gib(case: Case) -> float:
    """Peak memory as `fastdit plan` predicts it."""
    settings, model = config_of(case).training, meta_network(case)
    return sum(memory_by_kind(model, settings, settings.activation_checkpointing, case.batch, world=1).values()) / GIB


def fitting(cases: list[Case]) -> list[Case]:
    """The cases at the batch, halved from their own, at which fastdit is predicted to fit this GPU with an fp32 stream.

    The official design, eager in fp32, keeps more than twice as much and starts at half of that.
    """
    card = card_of(torch.device(cases[0].device))
    if card is None:
        return cases
    plain = replace(cases[0], stack="fastdit", overrides=())
    while predicted_gib(plain) > card.gib * (1 - RESERVED):
        plain = replace(plain, batch=plain.batch // 2)
    return [replace(case, batch=plain.batch // (2 if case.stack == "official" else 1)) for case in cases]


def figures(rows: list[Row]) -> list[dict]:
    """The fields of each contestant's JSON line. FLOPs count matrix products once, without recomputation."""
    flops = 3 * meta_network(rows[0].case).flops_per_image()  # forward, and twice that backward
    product = [result["product_tflops"] for row in rows for result in row.results if "product_tflops" in result]
    product = statistics.median(product) if product else None
    card = card_of(torch.device(rows[0].case.device))
    rates, lines = compared({row.case.name: row.rates for row in rows if row.rates}), []
    for row in rows:
        case = row.case
        line = {"contestant": case.name, "size": case.size, "device": case.device, "overrides": list(case.overrides),
                "batch": case.batch}  # fmt: skip
        if row.results:
            first = row.results[0]
            line |= {"precision": first["precision"], "first_step_s": round(first["first_step_s"], 2),
                     "loss_error": float(f"{row.errors[0]:.2g}"),
                     "displacement_error": float(f"{row.errors[1]:.2g}")}  # fmt: skip
            if "profile_ms" in first:
                line["profile_ms"] = {kind: round(ms, 3) for kind, ms in first["profile_ms"].items()}
                line["kernels"] = {name[:120]: [round(ms, 3), calls] for name, (ms, calls) in first["kernels"].items()}
        if case.stack == "fastdit" and case.device != "cpu":  # a CPU's peak is that of the whole process
            line["predicted_gib"] = significant(predicted_gib(case))
        if row.failed:
            line["failed"] = row.failed.strip().splitlines()[-1]
        if row.rates:
            images = statistics.median(row.rates)
            tflops = flops * images / 1e12
            line |= rates[case.name] | {
                "steps_per_s": significant(images / case.batch),
                "slowest_step": significant(case.batch / max(s for r in row.results for s in r["seconds"])),
                "tflops": significant(tflops),
                "mfu": card and round(tflops / card.tflops, 4),
                "of_product": product and round(tflops / product, 4),
                "product_tflops": product and significant(product),
                "peak_gib": round(row.results[-1]["peak_gib"], 2),
                "reserved_gib": round(row.results[-1]["reserved_gib"], 2),
                "steps": len(row.results[0]["seconds"]),
            }
        lines.append(line)
    return lines


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def title_of(line: dict) -> str:
    return CONTESTANTS.get(line["contestant"], f"fastdit, {line['contestant']}")


def table(lines: list[dict], about: dict) -> str:
    """Markdown: one row per line with the ratios beside it, then a step's time by kind if it was profiled."""
    text = f"Size {lines[0]['size']}, {about['hardware']}, torch {about['torch']}, {about['commit']}, {about['date']}\n"
    ratios = {name for line in lines for name in line.get("over", {})}
    against = [name for name in ("strong", "fast-dit", "official", "fastdit") if name in ratios]
    header = ["contestant", "precision", "batch", "images/s", "min .. max", *(f"x {name}" for name in against),
              "TFLOP/s", "MFU", "of the product", "peak GiB", "predicted", "first step s", "loss error"]  # fmt: skip
    rows = []
    for line in lines:
        if "images_per_s" not in line:
            rows.append([title_of(line), *[""] * (len(header) - 2), f"**{line.get('failed', 'not run yet')}**"])
            continue
        rows.append([
            title_of(line), line["precision"], line["batch"], f"**{line['images_per_s']}**",
            "{} .. {}".format(*line["spread"]), *(line["over"].get(other, 1) for other in against), line["tflops"],
            percent(line["mfu"]), percent(line["of_product"]), line["peak_gib"],
            line.get("predicted_gib", ""), line["first_step_s"], line["loss_error"],
        ])  # fmt: skip
    text += "\n" + markdown([header, *rows])
    if product := next((line["product_tflops"] for line in lines if line.get("product_tflops")), None):
        text += f"\nA large bf16 matrix product in the same run: {product} TFLOP/s. Ratios: medians over the rounds.\n"
    if "caches" in about:
        text += f"First step: with {about['caches']} compiler caches.\n"
    profiled = [line for line in lines if "profile_ms" in line]
    if profiled:
        kinds = sorted({kind for line in profiled for kind in line["profile_ms"]},
                       key=lambda kind: -max(line["profile_ms"].get(kind, 0) for line in profiled))  # fmt: skip
        rows = [[kind, *(f"{line['profile_ms'].get(kind, 0):.2f}" for line in profiled)] for kind in kinds]
        text += "\n" + markdown([["ms of a step", *(line["contestant"] for line in profiled)], *rows])
    for line in profiled:
        rows = [[f"`{name}`", f"{calls:g}", f"{ms:.2f}"] for name, (ms, calls) in line["kernels"].items()]
        text += "\n" + markdown([[f"{line['contestant']}: the largest kernels", "calls a step", "ms a step"], *rows])
    return text


def chart(lines: list[dict], hardware: str, path: Path) -> None:
    """Images/s as bars, with the slowest and the fastest turn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [line for line in lines if "images_per_s" in line][::-1]
    rates = [line["images_per_s"] for line in lines]
    errors = [[rate - line["spread"][0] for rate, line in zip(rates, lines, strict=True)],
              [line["spread"][1] - rate for rate, line in zip(rates, lines, strict=True)]]  # fmt: skip
    figure, axes = plt.subplots(figsize=(9, 1 + 0.5 * len(lines)), layout="constrained")
    colors = ["tab:orange" if line["contestant"].startswith("fastdit") else "tab:gray" for line in lines]
    bars = axes.barh(list(map(title_of, lines)), rates, xerr=errors, color=colors, capsize=3)
    axes.bar_label(bars, [f" {rate:g}" for rate in rates])
    axes.margins(x=0.2)
    axes.set(xlabel="images/s", title=", ".join([*(line["size"] for line in lines[:1]), hardware]))
    figure.savefig(path, dpi=120)
    plt.close(figure)
