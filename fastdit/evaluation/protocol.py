"""How a result was measured: its protocol, its values in words, and comparisons that refuse unlike protocols."""

import inspect
import json
from pathlib import Path
from typing import Any

from fastdit.evaluation import metrics as formulas
from fastdit.files import read_text

PROTOCOL = 2  # increases when the same files and settings give other digits or hashes
SUBJECT = ("checkpoint", "sha256", "vae", "fastdit")  # of samples: what may differ between results that are compared
FUNCTIONS = {  # whose defaults are part of the protocol
    "frechet_infinity": formulas.frechet_infinity,
    "kid": formulas.kernel_distance,
    "precision_recall": formulas.precision_recall,
    "density_coverage": formulas.density_coverage,
    "inception_score": formulas.inception_score,
}


def defaults(name: str) -> dict[str, Any]:
    """The settings of a metric: the defaults of its function."""
    if name not in FUNCTIONS:
        return {}
    parameters = inspect.signature(FUNCTIONS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty and p.name != "seed"}


def summary(result: dict[str, Any]) -> str:
    """The values of a result in a few lines."""
    values, protocol, real = result["values"], result["protocol"], result["real"]
    known = protocol["reference"]["images"] or "an unknown number"
    lines = [f"{protocol['num_images']} images, {known} in the reference"]
    if "frechet" in values:
        lines.append(f"{result['distance']:<26}{_number('frechet', values)}")
    if real:
        counts = f"{real['num_images']} against {real['reference_images']} images"
        lines.append(f"{'real against real':<26}{real['frechet']:.4f} ({counts})")
    for name, title in (("frechet_infinity", "... for infinitely many"), ("kid", "KID")):
        if name in values:
            lines.append(f"{title:<26}{_number(name, values)} +- {_number(f'{name}_error', values)}")
    rest = [key for key in values if not key.startswith(("frechet", "kid"))]
    return "\n".join(lines + [f"{key.replace('_', ' '):<26}{_number(key, values)}" for key in rest])


def _number(key: str, values: dict[str, float]) -> str:
    return f"{values[key]:.{6 if key.startswith('kid') else 4}f}"  # a KID is mostly below 0.1


def compare(a: str | Path, b: str | Path) -> str:
    """The last results of two files side by side; ValueError that names every difference of their protocols."""
    results = [read_result(path) for path in (a, b)]
    common = [name for name in results[0]["protocol"]["metrics"] if name in results[1]["protocol"]["metrics"]]
    flat = []
    for result in results:
        protocol = result["protocol"] | {"metrics": {name: result["protocol"]["metrics"][name] for name in common}}
        flat.append(dict(_flat(protocol)))
    names = sorted({*flat[0], *flat[1]})
    unlike = [f"{n}={flat[0].get(n)} and {flat[1].get(n)}" for n in names if flat[0].get(n) != flat[1].get(n)]
    if unlike:
        raise ValueError(f"{a} and {b} were not measured alike: {'; '.join(unlike)}; measure both the same way")
    rows = [["", str(a), str(b)]]
    for key in ("samples", "sha256"):
        rows.append([key, *(str(result["subject"].get(key)) for result in results)])
    for key in results[0]["values"]:
        if key in results[1]["values"]:
            title = results[0]["distance"] if key == "frechet" else key.replace("_", " ")
            rows.append([title, *(_number(key, result["values"]) for result in results)])
    if all(result["real"] for result in results):
        rows.append(["real against real", *(_number("frechet", result["real"]) for result in results)])
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def read_result(path: str | Path) -> dict[str, Any]:
    """The last result in a file of JSON lines."""
    if not Path(path).is_file():
        raise ValueError(f"--compare: {path} does not exist; write it with fastdit evaluate --out {path}")
    lines = [line for line in read_text(Path(path)).splitlines() if line.strip()]
    try:
        result = json.loads(lines[-1])
        shapes = all(isinstance(result[key], dict) for key in ("protocol", "subject", "values"))
        if not (shapes and isinstance(result["protocol"]["metrics"], dict) and {"distance", "real"} <= result.keys()):
            raise ValueError
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise ValueError(f"--compare: {path} has no result in its last line; write it with fastdit evaluate "
                         f"--out {path}") from None  # fmt: skip
    return result


def _flat(tree: dict, prefix: str = ""):
    """(dotted key, value) of every leaf."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
