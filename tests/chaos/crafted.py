"""Hostile files that keep the form of the good ones: tensors, settings, links in run folders."""

import argparse
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import yaml

from chaos import contents, pictures
from chaos.contents import Payload
from chaos.corpus import STEP, Case, Good, copied, seal
from fastdit.files import read_yaml, sealed


def cases(good: Good, draw: random.Random, values: int) -> Iterator[Case]:
    """`values`: how many of VALUES each setting gets, drawn at random."""
    yield from pictures.cases(good)
    for name, change in TENSORS.items():
        yield Case("tensors", name, partial(weights, good, change), refused=True)
    for name, text in OVERRIDES.items():
        yield Case("overrides", name, partial(override, good, text))
    for artifact, (place, file, method, read, write) in SETTINGS.items():
        tree = read((good.root / place).resolve() / file)
        for path in leaves(tree):
            for value in draw.sample(VALUES, values):
                made = partial(setting, good, place, file, method, read, write, path, value)
                yield Case(artifact, f"{'.'.join(map(str, path))}={str(value)[:30]}", made)
    for name in LINKS:
        yield Case("links in output folders", name, partial(link, good, name), whole=True)
    for name, make in FOLDERS.items():
        yield Case("diffusers code", name, partial(pipeline, good, make), whole=True)


# tensors in official files -------------------------------------------------------------------------------------------


def only(change: Callable[[dict], dict | None]) -> Callable:
    """A change of the plain state dict."""

    def changed(state: dict, path: Path, canary: Path) -> None:
        new = change(state)
        torch.save(state if new is None else new, path)

    return changed


def expanded(state: dict) -> dict:
    """One number that stands for 10^12."""
    return state | {"x_embedder.proj.weight": torch.zeros(1).expand(1_000_000, 4, 500, 500)}


def itself(state: dict) -> dict:
    loop: dict = {"weight": torch.zeros(1)}
    return loop | {"model": loop.setdefault("model", loop)}


def zipped(state: dict, path: Path, canary: Path) -> None:
    """A torch file whose pickle is 3 GiB of zeros."""
    path.write_bytes(contents.zip_bomb("archive/data.pkl", b"\x80\x02"))


def nested(state: dict, path: Path, canary: Path) -> None:
    pickled = b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."
    path.write_bytes(contents.npz({"archive/data.pkl": pickled, "archive/version": b"3"}))


TENSORS = {
    "a payload in a tensor's place": lambda s, p, c: torch.save(s | {"pos_embed": Payload(c)}, p),
    "a payload in the old format": lambda s, p, c: contents.torch_file(p, s | {"pos_embed": Payload(c)}, zipped=False),
    "a payload in the args": lambda s, p, c: torch.save({"ema": s, "args": argparse.Namespace(lr=Payload(c))}, p),
    "a payload in the optimizer": lambda s, p, c: torch.save({"ema": s, "opt": [Payload(c)]}, p),
    "a tensor that is larger than its storage": only(expanded),
    "block number 10^12": only(lambda s: s | {"blocks.999999999999.x": torch.zeros(1)}),
    "a tensor without storage": only(lambda s: s | {"pos_embed": torch.empty(1, 10**9, 10**6, device="meta")}),
    "a sparse tensor": only(lambda s: s | {"pos_embed": torch.sparse_coo_tensor(size=(1, 10**6, 10**6))}),
    "complex numbers": only(lambda s: s | {"pos_embed": s["pos_embed"].cfloat()}),
    "whole numbers": only(lambda s: s | {"pos_embed": s["pos_embed"].long()}),
    "names that are numbers": only(lambda s: s | {7: torch.zeros(1)}),
    "a dictionary that holds itself": only(itself),
    "50000 levels of lists": nested,
    "a pickle that takes 3 GiB": zipped,
    "args of other types": only(lambda s: {"ema": s, "args": {"path_type": [1], "vae": {}, "model": 5, 3: 4}}),
    "args of a number that is none": only(lambda s: {"ema": s, "args": {"num_classes": [10**15]}}),
    "no tensor": only(lambda s: {}),
    "text": lambda s, p, c: p.write_text("hello"),
}


def weights(good: Good, change: Callable, folder: Path) -> list[list[str]]:
    path = folder / "out" / "in.pt"
    path.parent.mkdir(parents=True)
    state = torch.load(good.root / "official.pt", weights_only=True)["ema"]
    change(state, path, folder / "canary")
    return good.read_foreign(path, folder / "out")


# settings ------------------------------------------------------------------------------------------------------------

OVERRIDES = {
    "a tag": "data={0}",
    "an alias": "data={{a: &a [1, 2], b: *a}}",
    "aliases": "training.deepspeed={{a: &a [x, x, x], b: &b [*a, *a, *a], c: [*b, *b, *b]}}",
    "100,000 brackets": "data=" + "[" * 60_000,
    "10,000 sections": ".".join("a" * 10_000) + "=1",
    "a number of 10^5 digits": "training.steps=" + "9" * 100_000,
    "nan": "training.lr=.nan",
    "inf": "training.lr=.inf",
    "inf steps": "training.steps=.inf",
    "a date": "training.steps=2024-99-99",
    "an attribute": "training.__class__=x",
    "a variant of 10^9 blocks": "model.variant=DiT-1000000000x64x4/2",
    "a variant of 10^9 channels": "model.variant=DiT-1x1000000000x1/2",
    "nothing": "=",
    "bytes that are not UTF-8": os.fsdecode(b"data.shards=\xff\xfe"),
}


def override(good: Good, text: str, folder: Path) -> list[list[str]]:
    line = text.format(contents.tag(folder / "canary").strip()) if "{" in text else text
    return [
        ["train.py", *good.config, f"run_dir={folder}/out/run", line],
        ["fastdit/cli.py", "plan", *good.config, line],
        ["sample_ddp.py", "--checkpoint", f"{good.root}/run", "--out", f"{folder}/out/s", "--num-samples", "2", line],
    ]


def read_json(path: Path):
    return json.loads(path.read_text())


def write_json(path: Path, tree) -> None:
    path.write_text(json.dumps(tree))


def write_sealed(path: Path, tree: dict) -> None:
    """checkpoint.json or manifest.json with its own digest made right."""
    path.write_text(json.dumps(sealed(tree)))


def write_yaml(path: Path, tree: dict) -> None:
    path.write_text(yaml.safe_dump(tree))
    seal(path)


def leaves(tree, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value in nested dictionaries and lists, the containers included."""
    if path:
        yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from leaves(value, (*path, key))


VALUES = [None, "../../x", -1, 10**12, 1e308, [], {"a": 1}, [[1]], True]
# artifact -> its place, the file, the commands, and how its tree is read and written
SETTINGS = {
    "facts of a checkpoint": ("run", f"{STEP}/checkpoint.json", "read_run", read_json, write_sealed),
    "config of a checkpoint": ("run", f"{STEP}/config.yaml", "read_run", read_yaml, write_yaml),
    "settings of a manifest": ("../latents", "manifest.json", "read_latents", read_json, write_sealed),
    "settings of an autoencoder": ("../vae", "config.json", "read_vae", read_json, write_json),
    "settings of a transformer": ("pipe", "transformer/config.json", "read_foreign", read_json, write_json),
    "settings of a scheduler": ("pipe", "scheduler/scheduler_config.json", "read_foreign", read_json, write_json),
    "facts of an export": ("pipe", "fastdit.json", "read_foreign", read_json, write_json),
    "index of a pipeline": ("pipe", "model_index.json", "read_foreign", read_json, write_json),
    "settings of samples": ("samples", "sampling.json", "read_samples", read_json, write_json),
}


def setting(good: Good, place: str, file: str, method: str, read, write, path: tuple, value, folder: Path):
    copy = copied(good, place, folder)
    tree = read(copy / file)
    *parents, last = path
    node = tree
    for key in parents:
        node = node[key]
    node[last] = value
    write(copy / file, tree)
    return getattr(good, method)(copy, folder / "out")


# code beside a diffusers folder --------------------------------------------------------------------------------------


def code(folder: Path, canary: Path) -> None:
    for name in ("evil.py", "pipeline.py", "__init__.py", "modeling_evil.py"):
        for parent in (folder, folder / "transformer", folder / "vae", folder / "scheduler"):
            (parent / name).write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")


def changed(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


FOLDERS = {
    "a class in a module of the folder": lambda f: changed(f / "model_index.json", transformer=["evil", "Evil"]),
    "an autoencoder in a module of the folder": lambda f: changed(f / "model_index.json", vae=["pipeline", "Evil"]),
    "a pipeline class of its own": lambda f: changed(f / "model_index.json", _class_name=["pipeline", "Evil"]),
    "auto_map of the transformer": lambda f: changed(
        f / "transformer/config.json", auto_map={"AutoModel": "modeling_evil.Evil"}, trust_remote_code=True
    ),
    "auto_map of the autoencoder": lambda f: changed(
        f / "vae/config.json", auto_map={"AutoModel": "modeling_evil.Evil"}, trust_remote_code=True
    ),
    "_class_name of the transformer": lambda f: changed(f / "transformer/config.json", _class_name="evil.Evil"),
    "_class_name of the autoencoder": lambda f: changed(f / "vae/config.json", _class_name="../evil.Evil"),
    "_class_name of the scheduler": lambda f: changed(f / "scheduler/scheduler_config.json", _class_name="evil.Evil"),
    "quantization by a package": lambda f: changed(
        f / "transformer/config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
    ),
    "an index of weights elsewhere": lambda f: (
        (f / "vae/diffusion_pytorch_model.safetensors").unlink(),
        (f / "vae/diffusion_pytorch_model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": {"encoder.conv_in.weight": "../../../../etc/passwd"}})
        ),
    ),
}


def pipeline(good: Good, make: Callable, folder: Path) -> list[list[str]]:
    copy = copied(good, "pipe", folder)
    code(copy, folder / "canary")
    make(copy)
    return good.read_foreign(copy, folder / "out") + good.read_vae(copy, folder / "out")


# links in the folders that commands write into -----------------------------------------------------------------------

LINKS = [
    "run/config.yaml", "run/metrics.jsonl", "run/metrics.jsonl.partial", "run/metrics.partial", "run/skipped.jsonl",
    "run/config.yaml.partial", "run/lock", "run/lock.partial", "run/lock.takeover", "run/lock.new", "run/stop",
    "run/checkpoints/step-0000003.partial", "run/checkpoints/step-0000003", "run/averages/step-0000003.partial",
    "run/checkpoints/step-0000003.replaced.partial", "samples/sampling.json", "samples/sampling.json.partial",
    "samples/samples.npz", "samples/samples.partial", "samples/grid.png", "samples/images/000000.partial",
    "samples/images/000000.png", "latents", "latents.partial", "latents.writing", "latents.replaced", "converted",
    "converted.partial", "converted.pt", "converted.pt.partial", "tuned",
]  # fmt: skip


def link(good: Good, name: str, folder: Path) -> list[list[str]]:
    out = folder / "out"
    copied(good, "run", folder)
    copied(good, "samples", folder)
    shutil.rmtree(out / "samples" / "images")
    (out / "samples" / "images").mkdir()
    (folder / "victim").write_text("precious")
    contents.remove(out / name)
    (out / name).symlink_to(folder / "victim")
    source = f"{good.root}/official.pt"
    return [
        ["extract_features.py", "--images", f"{good.root}/images", "--out", f"{out}/latents", "--vae",
         f"{good.world}/vae", "--image-size", "32"],
        ["fastdit/cli.py", "convert", source, "--to", "fastdit", "--out", f"{out}/converted"],
        ["fastdit/cli.py", "convert", source, "--to", "official", "--out", f"{out}/converted.pt"],
        *good.read_samples(out / "samples", out),
        ["train.py", *good.config, f"run_dir={out}/run", "training.steps=3", "--resume"],
    ]  # fmt: skip
