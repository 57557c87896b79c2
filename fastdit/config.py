"""Configuration: frozen dataclasses, filled strictly from YAML and `section.key=value` overrides.

Every value is converted by its annotation (YAML reads `1e-4` as a string); an unknown key fails and names the nearest
known one. A section `{name: ..., option: ...}` names an entry of a registry; its options are checked against that
entry's own signature by `build`, so a new objective or sampler brings its options with it.
"""

import dataclasses
import difflib
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml


def _require(holds: bool, key: str, value: Any, remedy: str) -> None:
    if not holds:
        raise ValueError(f"{key}={value!r} is out of range; {remedy}")


@dataclass(frozen=True)
class Choice:
    """An entry of a registry by name, with that entry's own options beside the name."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataConfig:
    shards: str = ""  # folder written by extract_features.py
    image_size: int = 256  # pixels
    num_classes: int = 1000  # 0 trains an unconditional network
    hflip: bool = True  # mirror half of the images
    vae: str = "stabilityai/sd-vae-ft-ema"  # decodes the samples; the shards say which one encoded them
    prefetch: int = 4  # batches read ahead

    def __post_init__(self):
        _require(self.image_size > 0, "data.image_size", self.image_size, "use a positive number of pixels")
        _require(self.num_classes >= 0, "data.num_classes", self.num_classes, "use 0 for an unconditional network")


@dataclass(frozen=True)
class ModelConfig:
    variant: str = "DiT-XL/2"  # or any depth x hidden x heads / patch: "DiT-6x384x6/2"
    class_dropout: float = 0.1  # share of labels replaced by the null label, for classifier-free guidance
    attention: str = "auto"  # a backend of models/attention.py; auto: the fastest known for this GPU and shape
    learn_sigma: bool | None = None  # 2C output channels; null: as the objective asks. True with flow: SiT's idle half
    block: Literal["adaln_zero", "adaln", "in_context", "cross_attention"] = "adaln_zero"  # how time and label act
    norm: Literal["layer", "rms"] = "layer"
    qk_norm: Literal["none", "rms", "layer"] = "none"  # norm of each head's queries and keys
    mlp: Literal["gelu_tanh", "gelu", "swiglu"] = "gelu_tanh"  # gelu: exact; swiglu: two thirds as wide, gated
    mlp_ratio: float = 4.0  # width of the MLP over the hidden size
    position: Literal["sincos", "rope", "sincos_rope"] = "sincos"  # fixed table, rotary (2-D), or both
    registers: int = 0  # learned tokens beside the patches
    qkv_bias: bool = True  # biases of attention's first linear,
    proj_bias: bool = True  # of its second,
    mlp_bias: bool = True  # and of the MLP's two
    dropout: float = 0.0  # share of every branch's values dropped in training
    unpatchify: Literal["linear", "transposed_conv"] = "linear"

    def __post_init__(self):
        for key in ("class_dropout", "dropout"):
            _require(0 <= getattr(self, key) < 1, f"model.{key}", getattr(self, key), "use a share in [0, 1)")
        _require(self.registers >= 0, "model.registers", self.registers, "use 0 for none, 4 or more")
        _require(self.mlp_ratio > 0, "model.mlp_ratio", self.mlp_ratio, "use a positive factor, 4 in the paper")


@dataclass(frozen=True)
class TrainingConfig:
    steps: int = 400_000
    global_batch: int = 256  # images a step over all processes
    micro_batch: int = 0  # images a forward pass on one process; 0: all of its share; -1: as many as its GPU holds
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 0  # the learning rate rises linearly over these
    grad_clip: float = 0.0  # largest gradient norm; 0: no clipping
    ema_decay: float = 0.9999
    ema_warmup: bool = False  # decay min(ema_decay, (1 + step) / (10 + step)): for runs of a few hundred steps
    precision: Literal["bf16", "fp32"] = "bf16"  # of the computation; weights, moments and EMA are always fp32
    fp8: bool = False  # the blocks' linears multiply in FP8, the rest in bf16: Ada, Hopper or newer, with torchao
    residual: Literal["fp32", "bf16"] = "fp32"  # residual stream between the blocks, when precision is bf16
    cuda_graph: bool = False  # replay the whole step, optimiser and EMA included: one GPU, fixed shapes
    # what backward makes again: activation: GELU; selective: that and the norms; auto: as little as the memory allows
    activation_checkpointing: Literal["none", "activation", "selective", "full", "auto"] = "none"
    compile: Literal[True, False, "whole"] = True  # true: each block, seconds to the first step; whole: all at once
    joint_adaln: bool = False  # the adaLN projections of all blocks as one product: for small batches
    loss_aware_times: bool = False  # DDPM: draw each time in proportion to its loss's size, for loss_type=kl
    engine: Literal["auto", "torch", "deepspeed"] = "auto"  # auto: deepspeed under its launcher
    zero_stage: int = 1
    deepspeed: dict[str, Any] = field(default_factory=dict)  # passed through to DeepSpeed's JSON
    log_every: int = 50
    checkpoint_every: int = 10_000
    keep_checkpoints: int = 3  # the newest; 0 keeps all

    def __post_init__(self):
        for key in ("steps", "global_batch", "log_every", "checkpoint_every"):
            _require(getattr(self, key) >= 1, f"training.{key}", getattr(self, key), "use 1 or more")
        _require(self.micro_batch >= -1, "training.micro_batch", self.micro_batch, "use -1 for as many as fit")
        for key in ("weight_decay", "warmup_steps", "grad_clip", "keep_checkpoints"):
            _require(getattr(self, key) >= 0, f"training.{key}", getattr(self, key), "use 0 or more")
        _require(self.lr > 0, "training.lr", self.lr, "use a positive learning rate, 1e-4 in the paper")
        _require(0 <= self.ema_decay < 1, "training.ema_decay", self.ema_decay, "use 0 to below 1, 0.9999 as published")
        if self.fp8:
            _require(self.precision == "bf16", "training.fp8", True, "use training.precision=bf16 with it")
            _require(self.zero_stage < 3, "training.fp8", True, "use training.zero_stage=1 or 2 with it")
            policy = self.activation_checkpointing  # FP8 products keep inputs of their own
            _require(policy != "activation", "training.activation_checkpointing", policy, "use selective with fp8=true")
        if self.joint_adaln:
            _require(self.zero_stage < 3, "training.joint_adaln", True, "use training.zero_stage=1 or 2 with it")
        _require(self.zero_stage in (1, 2, 3), "training.zero_stage", self.zero_stage, "use 1, 2 or 3")

    @property
    def residual_bytes(self) -> int:
        """Bytes a value of the residual stream."""
        return 2 if self.residual == self.precision == "bf16" else 4


@dataclass(frozen=True)
class SamplingConfig:
    sampler: Choice = Choice("ddpm")
    steps: str = "250"  # network evaluations, or a respacing: "ddim50", "10,15,20"
    cfg_scale: float = 1.0  # 1: no guidance
    cfg_channels: int = 0  # guided latent channels, 3 in the official release; 0: all
    batch_size: int = 50
    precision: Literal["bf16", "fp32"] = "fp32"
    compile: bool = True  # on a GPU: the blocks compiled, the network's evaluations replayed as a CUDA graph

    def __post_init__(self):
        _require(self.batch_size >= 1, "sampling.batch_size", self.batch_size, "use 1 or more")
        _require(self.cfg_channels >= 0, "sampling.cfg_channels", self.cfg_channels, "use 0 for all, 3 as released")


@dataclass(frozen=True)
class Config:
    run_dir: str = "runs/default"
    seed: int = 0
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    objective: Choice = Choice("ddpm")
    training: TrainingConfig = TrainingConfig()
    sampling: SamplingConfig = SamplingConfig()


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file and apply overrides like `training.lr=2e-4`; ValueError names file, key, value and remedy."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--config {path} does not exist; the shipped ones are in configs/")
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"--config {path} must hold sections like `training:`, not {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    try:
        return _fill(Config, tree, "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def shipped_config(name: str) -> Path:
    """The file configs/<name>.yaml of this clone, or of the installed wheel."""
    places = [Path(__file__).parents[1] / "configs", Path(sys.prefix) / "share/fastdit/configs"]
    return next((p / f"{name}.yaml" for p in places if (p / f"{name}.yaml").is_file()), places[0] / f"{name}.yaml")


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved config as YAML that `load_config` reads back to an equal one."""
    Path(path).write_text(yaml.safe_dump(to_tree(config), sort_keys=False))


def to_tree(value: Any) -> Any:
    """Plain dicts, lists and scalars of a config."""
    if isinstance(value, Choice):
        return {"name": value.name, **value.options}
    if dataclasses.is_dataclass(value):
        return {f.name: to_tree(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


def lookup(registry: Mapping[str, Any], name: str, key: str) -> Any:
    """`registry[name]`; ValueError with the nearest known name and all of them."""
    if name not in registry:
        near = difflib.get_close_matches(str(name), registry, 1, 0)[0]
        raise ValueError(f"{key}={name!r} is unknown; did you mean {near!r}? Known: {', '.join(registry)}")
    return registry[name]


def build(registry: Mapping[str, type], choice: Choice, key: str) -> Any:
    """An instance of the dataclass that `choice` names, its options checked and converted by their annotations."""
    return bind(registry, choice, key)()


def bind(registry: Mapping[str, Callable], choice: Choice, key: str) -> Callable:
    """The function (or class) that `choice` names, bound to its options: those of its signature that YAML can spell."""
    entry = lookup(registry, choice.name, f"{key}.name")
    known = _options(entry)
    for option, value in choice.options.items():
        others = [name for name, other in registry.items() if option in _options(other)]
        if others and option not in known:
            raise ValueError(
                f"{key}.{option}={value!r} is an option of {' and '.join(others)}, not of {choice.name}; "
                f"remove it, or use {key}.name={others[0]}"
            )
    return functools.partial(entry, **_convert_all(known, choice.options, key))


def _options(entry: Callable) -> dict[str, Any]:
    """Names and annotations of the arguments with a default that YAML can spell."""
    hints = typing.get_type_hints(entry.__init__ if inspect.isclass(entry) else entry)
    keywords = {p.name for p in inspect.signature(entry).parameters.values() if p.default is not p.empty}
    return {name: hint for name, hint in hints.items() if name in keywords and _is_plain(hint)}


def _is_plain(hint: Any) -> bool:
    plain = (int, float, str, bool)
    return hint in plain or typing.get_origin(hint) is Literal or any(a in plain for a in typing.get_args(hint))


def _override(tree: dict, override: str) -> None:
    dotted, sign, text = override.partition("=")
    if not sign or not dotted:
        raise ValueError(f"override {override!r} is not of the form section.key=value")
    *sections, last = dotted.split(".")
    for section in sections:
        if isinstance(tree.get(section), str):  # `objective: flow` is short for `objective: {name: flow}`
            tree[section] = {"name": tree[section]}
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ValueError(f"override {override!r}: {section} is a value, not a section")
    tree[last] = yaml.safe_load(text)


def _fill(cls: type, tree: Any, key: str) -> Any:
    if not isinstance(tree, dict):
        known = ", ".join(f.name for f in dataclasses.fields(cls))
        raise ValueError(f"{key}={tree!r} must be a section with keys {known}")
    return cls(**_convert_all(typing.get_type_hints(cls), tree, key))


def _convert_all(hints: Mapping[str, Any], tree: Mapping[str, Any], key: str) -> dict[str, Any]:
    values = {}
    for name, value in tree.items():
        full = f"{key}.{name}" if key else str(name)
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, 1, 0)
            hint = f"did you mean {near[0]!r}? Known: {', '.join(hints)}" if near else "it takes no options"
            raise ValueError(f"{full}={value!r} is not a known key; {hint}")
        values[name] = _convert(hints[name], value, full)
    return values


def _convert(hint: Any, value: Any, key: str) -> Any:
    """`value` as the annotation `hint` wants it; strings that spell a number count as that number."""
    if hint is Choice:
        tree = {"name": value} if isinstance(value, str) else value
        if not isinstance(tree, dict) or not isinstance(tree.get("name"), str):
            raise ValueError(f"{key}={value!r} must be a name, or a section with `name:` and its options")
        return Choice(tree["name"], {k: v for k, v in tree.items() if k != "name"})
    if dataclasses.is_dataclass(hint):
        return _fill(hint, value if value is not None else {}, key)
    if typing.get_origin(hint) is Literal:
        if not any(value == known and type(value) is type(known) for known in typing.get_args(hint)):  # 1 is not True
            raise ValueError(f"{key}={value!r} is not one of {', '.join(map(str, typing.get_args(hint)))}")
        return value
    if isinstance(hint, types.UnionType):  # X | None
        return None if value is None else _convert(typing.get_args(hint)[0], value, key)
    origin = typing.get_origin(hint) or hint
    if origin is tuple:
        parts = typing.get_args(hint)
        if not isinstance(value, list | tuple) or len(value) != len(parts):
            raise ValueError(f"{key}={value!r} must be a list of {len(parts)} numbers")
        return tuple(_convert(part, item, key) for part, item in zip(parts, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return value
    if origin is bool and isinstance(value, bool):
        return value
    if origin is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    if origin in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
            if origin is float:
                return number
            if number == int(number):
                return int(value) if isinstance(value, int) else int(number)
        except (TypeError, ValueError, OverflowError):
            pass
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a section"}[origin]
    raise ValueError(f"{key}={value!r} must be {wanted}")
