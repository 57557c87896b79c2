"""How a result was measured: its protocol, its values in words, and comparisons that refuse unlike protocols."""

import inspect
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fastdit import __version__
from fastdit.config import leaves
from fastdit.environment import commit, hardware
from fastdit.errors import counted
from fastdit.evaluation import metrics as formulas
from fastdit.evaluation.features import Extractor
from fastdit.evaluation.images import ImageSet
from fastdit.files import read_text

PROTOCOL = 3  # increases when the same files and settings give other digits or hashes
SUBJECT = ("checkpoint", "sha256", "vae", "fastdit")  # of samples: what may differ between results that are compared
FUNCTIONS = {  # whose defaults are part of the protocol
    "frechet_infinity": formulas.frechet_infinity,
    "kid": formulas.kernel_distance,
    "precision_recall": formulas.precision_recall,
    "density_coverage": formulas.density_coverage,
    "inception_score": formulas.inception_score,
}


def stamp(images: ImageSet, reference: dict[str, Any], extractor: Extractor, seed: int) -> dict[str, Any]:
    """The protocol of measuring these images, but for its metrics; `reference`: what is known about the real images."""
    return {
        "version": PROTOCOL,
        "num_images": images.count,
        "image_size": list(images.size),
        "cropped": images.cropped,
        "samples": {key: value for key, value in (images.sampling or {}).items() if key not in SUBJECT},
        "reference": reference,
        "features": extractor.name,
        "features_sha256": extractor.hash,
        "features_dim": extractor.dim,
        "seed": seed,
    }


def subject(images: ImageSet) -> dict[str, Any]:
    """What may differ between comparable results: the weights, and the names of files."""
    return {key: (images.sampling or {}).get(key) for key in SUBJECT}


def made_on(device: torch.device) -> dict[str, Any]:
    """Versions, hardware and time of a result."""
    return {
        "fastdit": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "hardware": hardware(device),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def remarks(result: dict[str, Any]) -> list[str]:
    """What a reader of the values must know: metrics left out, a decoded reference, and where images are too few."""
    if not result:  # of a process that is not the main one
        return []
    protocol = result["protocol"]
    lines = [f"{name} is left out: {reason}" for name, reason in result["left_out"].items()]
    if "decoded_by" in protocol["reference"]:
        lines.append("note: --reference was decoded from latents, so the distance leaves out the autoencoder's own "
                     "error; give the images themselves to include it")  # fmt: skip
    if result["subject"]["samples_sha256"] == protocol["reference"].get("sha256"):
        lines.append("warning: SAMPLES and --reference are the same images")
    dim, count = protocol["features_dim"], protocol["num_images"]
    if rough("frechet_infinity", result):
        part = "is still too large, and its error does not include that bias" if count < dim else (
            "is rough, because the bias is not linear in 1/N")  # fmt: skip
        lines.append(f"note: with {count} images of {dim} features, frechet_infinity {part}; use {4 * dim} or more")
    for name, count in (("SAMPLES", protocol["num_images"]), ("--reference", protocol["reference"]["images"])):
        if 0 < count <= dim:
            lines.append(f"warning: {name}: {count} images are too few for a covariance of {dim} features; compare at "
                         f"equal numbers only, or use more than {dim}")  # fmt: skip
    return lines


def defaults(name: str) -> dict[str, Any]:
    """The settings of a metric: the defaults of its function."""
    if name not in FUNCTIONS:
        return {}
    parameters = inspect.signature(FUNCTIONS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty and p.name != "seed"}


def summary(result: dict[str, Any]) -> str:
    """The values of a result in a few lines."""
    values, protocol = result["values"], result["protocol"]
    known = protocol["reference"]["images"] or "an unknown number"
    lines = [f"{counted(protocol['num_images'], 'image')}, {known} in the reference"]
    if "frechet" in values:
        lines.append(f"{result['distance']:<26}{shown('frechet', result)}")
    if result["real"]:
        lines.append(f"{'real against real':<26}{real_distance(result)}")
    for name, words in (("frechet_infinity", "... for infinitely many"), ("kid", "KID")):
        if name in values:
            lines.append(f"{words:<26}{shown(name, result)}")
    rest = [key for key in values if not key.startswith(("frechet", "kid"))]
    return "\n".join(lines + [f"{title(key, result):<26}{number(key, values)}" for key in rest])


def in_a_line(result: dict[str, Any]) -> str:
    """The values of a result, for a log."""
    parts = [f"{title(key, result)} {shown(key, result)}" for key in result["values"] if not key.endswith("_error")]
    return ", ".join(parts + [f"real against real {real_distance(result)}"] * bool(result["real"]))


def title(key: str, result: dict[str, Any]) -> str:
    """What a value is called."""
    return {"frechet": result["distance"], "spatial_frechet": "sFID", "kid": "KID"}.get(key, key.replace("_", " "))


def number(key: str, values: dict[str, float]) -> str:
    return f"{values[key]:z.{6 if key.startswith('kid') else 4}f}"  # a KID is mostly below 0.1


def shown(key: str, result: dict[str, Any]) -> str:
    """A value with its standard error, where it has one."""
    values, error = result["values"], f"{key}_error"
    text = number(key, values) + (f" +- {number(error, values)}" if error in values else "")
    return text + (" (rough)" if rough(key, result) else "")


def real_distance(result: dict[str, Any]) -> str:
    """The distance from one half of the real images to the other, as text."""
    real = result["real"]
    return f"{number('frechet', real)} ({real['num_images']} against {real['reference_images']} images)"


def rough(key: str, result: dict[str, Any]) -> bool:
    """Whether the images are too few for this value."""
    if key != "frechet_infinity" or key not in result["values"]:
        return False
    return formulas.is_rough(result["protocol"].get("num_images", 0), result["protocol"].get("features_dim", 0))


def compare(a: str | Path, b: str | Path) -> str:
    """The last results of two files side by side; ValueError that names every difference of their protocols."""
    results = [read_result(path) for path in (a, b)]
    common = [name for name in results[0]["protocol"]["metrics"] if name in results[1]["protocol"]["metrics"]]
    if not common:
        kinds = [", ".join(result["protocol"]["metrics"]) for result in results]
        raise ValueError(f"{a} has {kinds[0]}, {b} has {kinds[1]}; measure both with the same --metrics")
    flat = []
    for result in results:
        protocol = result["protocol"] | {"metrics": {name: result["protocol"]["metrics"][name] for name in common}}
        flat.append(settings_of(protocol))
    names = sorted({*flat[0], *flat[1]})
    unlike = [f"{n}={flat[0].get(n)} and {flat[1].get(n)}" for n in names if flat[0].get(n) != flat[1].get(n)]
    if unlike:
        raise ValueError(f"{a} and {b} were not measured alike: {'; '.join(unlike)}; measure both the same way")
    rows = [["", str(a), str(b)]]
    for key in ("samples", "sha256"):
        rows.append([key, *(str(result["subject"].get(key)) for result in results)])
    for key in results[0]["values"]:
        if key in results[1]["values"] and not key.endswith("_error"):
            rows.append([title(key, results[0]), *(shown(key, result) for result in results)])
    if all(result["real"] for result in results):
        rows.append(["real against real", *(number("frechet", result["real"]) for result in results)])
    return aligned(rows)


def aligned(rows: list[list[str]]) -> str:
    """Rows of cells as lines of text with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def find_result(
    path: str | Path, images: ImageSet, reference: dict, extractor: Extractor, seed: int, metrics: Iterable[str]
) -> dict[str, Any] | None:
    """The result in a file of JSON lines that the same measurement of the same weights gave, if it is there."""
    wanted, weights = settings_of(stamp(images, reference, extractor, seed)), subject(images)["sha256"]
    for line in read_text(Path(path)).splitlines() if Path(path).is_file() else ():
        try:
            result = _with_nan(json.loads(line))
            same = settings_of({k: v for k, v in result["protocol"].items() if k != "metrics"}) == wanted
            tried = result["protocol"]["metrics"].keys() | result["left_out"].keys()
            if same and result["subject"]["sha256"] == weights and set(metrics) <= tried:
                return result
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue  # a line of another kind
    return None


def _with_nan(result: dict[str, Any]) -> dict[str, Any]:
    """The result with nan where its values, or those of the real images, are null, as `append_json` writes nan."""
    for key in ("values", "real"):
        if isinstance(result[key], dict):
            result[key] = {name: math.nan if value is None else value for name, value in result[key].items()}
    return result


def read_result(path: str | Path) -> dict[str, Any]:
    """The last result in a file of JSON lines."""
    if not Path(path).is_file():
        raise ValueError(f"--compare: {path} does not exist; write it with fastdit evaluate --out {path}")
    try:
        lines = [line for line in read_text(Path(path)).splitlines() if line.strip()]
    except ValueError:
        raise ValueError(f"--compare: {path} is not a text file; give files of JSON lines that fastdit evaluate --out "
                         "wrote, not samples or a reference") from None  # fmt: skip
    try:
        result = _with_nan(json.loads(lines[-1]))
        shapes = all(isinstance(result[key], dict) for key in ("protocol", "subject", "values"))
        if not (shapes and isinstance(result["protocol"]["metrics"], dict) and {"distance", "real"} <= result.keys()):
            raise ValueError
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise ValueError(f"--compare: {path} has no result in its last line; write it with fastdit evaluate "
                         f"--out {path}") from None  # fmt: skip
    return result


def settings_of(protocol: dict) -> dict[str, Any]:
    """By dotted key, without the path of weak weights, whose hash is there as well."""
    settings = dict(leaves(protocol))
    if "samples.weak_sha256" in settings:
        settings.pop("samples.sampling.weak_checkpoint", None)
    return settings
