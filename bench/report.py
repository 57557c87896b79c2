"""The table and the chart of bench/step.py's lines."""

from pathlib import Path

from contestants import CONTESTANTS


def table(lines: list[dict]) -> str:
    """Markdown: a line each, the measured ratios beside it, then a step's time by kind where it was profiled."""
    first = lines[0]
    head = f"Size {first['size']}, {first['hardware']}, torch {first['torch']}, {first['commit']}, {first['date']}"
    ratios = {name for line in lines for name in line.get("over", {})}
    against = [name for name in ("official", "strong", "fastdit") if name in ratios]
    titles = ["contestant", "precision", "batch", "images/s", "turns from .. to", *(f"x {name}" for name in against),
              "TFLOP/s", "MFU", "of the product", "peak GiB", "predicted", "first step s", "loss error"]  # fmt: skip
    rows = [titles, ["---"] * len(titles)]
    for line in lines:
        name = CONTESTANTS.get(line["contestant"], f"fastdit, {line['contestant']}")
        if "images_per_s" not in line:
            rows.append([name, *[""] * (len(titles) - 2), f"**{line['failed']}**"])
            continue
        rows.append([
            name, line["precision"], line["batch"], f"**{line['images_per_s']}**",
            "{} .. {}".format(*line["spread"]), *(line["over"].get(other, 1) for other in against), line["tflops"],
            percent(line["mfu"]), percent(line["of_product"]), line["peak_gib"], line.get("predicted_gib", ""),
            line["first_step_s"], line["loss_error"],
        ])  # fmt: skip
    text = head + "\n\n" + markdown(rows)
    product = next((line["product_tflops"] for line in lines if line.get("product_tflops")), None)
    if product:
        text += f"\nA large bf16 matrix product in the same run: {product} TFLOP/s. Ratios: medians within turns.\n"
    profiled = [line for line in lines if "profile_ms" in line]
    if profiled:
        kinds = sorted({kind for line in profiled for kind in line["profile_ms"]},
                       key=lambda kind: -max(line["profile_ms"].get(kind, 0) for line in profiled))  # fmt: skip
        rows = [["ms of a step", *(line["contestant"] for line in profiled)], ["---"] * (1 + len(profiled))]
        rows += [[kind, *(f"{line['profile_ms'].get(kind, 0):.2f}" for line in profiled)] for kind in kinds]
        text += "\n" + markdown(rows)
    return text


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def markdown(rows: list[list]) -> str:
    return "".join("| " + " | ".join(map(str, row)) + " |\n" for row in rows)


def chart(lines: list[dict], path: Path) -> None:
    """Images/s as bars, with the slowest and the fastest turn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [line for line in lines if "images_per_s" in line][::-1]
    names = [CONTESTANTS.get(line["contestant"], f"fastdit, {line['contestant']}") for line in lines]
    rates = [line["images_per_s"] for line in lines]
    spread = [[line["images_per_s"] - line["spread"][0] for line in lines],
              [line["spread"][1] - line["images_per_s"] for line in lines]]  # fmt: skip
    figure, axes = plt.subplots(figsize=(9, 1 + 0.5 * len(lines)), layout="constrained")
    colours = ["tab:orange" if line["contestant"].startswith("fastdit") else "tab:gray" for line in lines]
    bars = axes.barh(names, rates, xerr=spread, color=colours, capsize=3)
    axes.bar_label(bars, [f" {rate:g}" for rate in rates])
    axes.margins(x=0.2)
    axes.set_xlabel("images/s")
    if lines:
        axes.set_title(f"{lines[0]['size']}, {lines[0]['hardware']}", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)
