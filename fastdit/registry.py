"""Registries: look up an entry by name, check its options against its signature, and convert values by annotation.

A registry is a plain dict from names to functions or dataclasses. A `Choice` is the name of an entry with options for
it. The entry's signature defines the valid options, so a new objective or sampler needs no other declaration of them.
"""

import dataclasses
import difflib
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Choice:
    """The name of a registry entry, and that entry's options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


class UnknownKey(ValueError):
    """A key that no section has: its dotted name and value."""

    def __init__(self, key: str, value: Any, message: str):
        super().__init__(message)
        self.key, self.value = key, value


def check(value: Any, known: Iterable, key: str) -> None:
    """Raises a ValueError with the closest match unless `value` is one of `known`."""
    known = list(known)
    if not any(value == item and type(value) is type(item) for item in known):  # 1 is not True
        names = [str(item) for item in known]
        near = difflib.get_close_matches(str(value), names, 1, 0)[0]
        raise ValueError(f"{key}={value!r} is unknown; did you mean {near!r}? Known: {', '.join(names)}")


def lookup(registry: Mapping[str, Any], name: str, key: str) -> Any:
    """Returns `registry[name]`; raises a ValueError as `check` does."""
    check(name, registry, key)
    return registry[name]


def check_literals(instance: Any, section: str = "") -> None:
    """Raises a ValueError for the first field annotated `Literal[...]` whose value is not one of the literals."""
    for name, hint in typing.get_type_hints(type(instance)).items():
        if typing.get_origin(hint) is Literal:
            check(getattr(instance, name), typing.get_args(hint), f"{section}.{name}" if section else name)


def build(registry: Mapping[str, type], choice: Choice, key: str) -> Any:
    """Creates the dataclass that `choice` names, with its options."""
    return bind(registry, choice, key)()


def bind(registry: Mapping[str, Callable], choice: Choice, key: str) -> Callable:
    """The function or class that `choice` names, as a partial with its options, converted by annotation."""
    entry = lookup(registry, choice.name, f"{key}.name")
    known = _options(entry)
    for option, value in choice.options.items():
        others = [name for name, other in registry.items() if option in _options(other)]
        if others and option not in known:
            raise ValueError(
                f"{key}.{option}={value!r} is an option of {' and '.join(others)}, not of {choice.name}; "
                f"remove it, or use {key}.name={others[0]}"
            )
    return functools.partial(entry, **convert_all(known, choice.options, key))


def _options(entry: Callable) -> dict[str, Any]:
    """Names and annotations of the arguments that have a default value and a type that YAML supports."""
    hints = typing.get_type_hints(entry.__init__ if inspect.isclass(entry) else entry)
    keywords = {p.name for p in inspect.signature(entry).parameters.values() if p.default is not p.empty}
    return {name: hint for name, hint in hints.items() if name in keywords and _is_plain(hint)}


def _is_plain(hint: Any) -> bool:
    plain = (int, float, str, bool)
    return hint in plain or typing.get_origin(hint) is Literal or any(a in plain for a in typing.get_args(hint))


def truth(value: Any) -> Any:
    """The boolean that yes, no, on and off stand for in YAML 1.1; other values unchanged."""
    words = {"yes": True, "on": True, "no": False, "off": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value


def convert_all(hints: Mapping[str, Any], tree: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Converts the values of a section by their annotations; `key` is the section's name in error messages."""
    values = {}
    for name, value in tree.items():
        full = f"{key}.{name}" if key else str(name)
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, 1, 0)
            hint = f"did you mean {near[0]!r}? Known: {', '.join(hints)}" if near else "it takes no options"
            raise UnknownKey(full, value, f"{full}={value!r} is not a known key; {hint}")
        values[name] = convert(hints[name], value, full)
    return values


def plain(value: Any) -> Any:
    """The value with plain numbers, which do not keep the text that YAML had for them; also in lists and sections."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    kind = next((kind for kind in (bool, int, float) if isinstance(value, kind)), None)
    return kind(value) if kind else value


def convert(hint: Any, value: Any, key: str) -> Any:
    """Converts `value` to the type `hint`. Accepts numbers as strings; a number as text is as YAML wrote it."""
    if hint is Choice:
        tree = {"name": value} if isinstance(value, str) else value
        if not isinstance(tree, dict) or not isinstance(tree.get("name"), str):
            raise ValueError(f"{key}={value!r} must be a name, or a section with `name:` and its options")
        return Choice(tree["name"], plain({k: v for k, v in tree.items() if k != "name"}))
    if dataclasses.is_dataclass(hint):
        value = {} if value is None else value
        if not isinstance(value, dict):
            known = ", ".join(f.name for f in dataclasses.fields(hint))
            raise ValueError(f"{key}={value!r} must be a section with keys {known}")
        return hint(**convert_all(typing.get_type_hints(hint), value, key))
    if typing.get_origin(hint) is Literal:
        if True in typing.get_args(hint):
            value = truth(value)
        check(value, typing.get_args(hint), key)
        return value
    if isinstance(hint, types.UnionType):  # X | None, X | tuple[...] | None
        kinds = typing.get_args(hint)
        lists = [kind for kind in kinds if typing.get_origin(kind) is tuple] if isinstance(value, list | tuple) else []
        return None if value is None else convert([*lists, *kinds][0], value, key)
    origin = typing.get_origin(hint) or hint
    if origin is tuple:
        parts = typing.get_args(hint)
        if parts[0] is Choice and isinstance(value, str | dict):  # one of them needs no list
            value = [value]
        if parts[-1] is ... and isinstance(value, list | tuple):  # tuple[float, ...]
            parts = parts[:1] * len(value)
        if not isinstance(value, list | tuple) or len(value) != len(parts):
            count = "" if parts[-1] is ... else f"{len(parts)} "
            raise ValueError(f"{key}={value!r} must be a list of {count}numbers")
        return tuple(convert(part, item, key) for part, item in zip(parts, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return plain(value)
    if origin is bool and isinstance(truth(value), bool):
        return truth(value)
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
    if value is None:  # such as training.init_from=$UNSET, which must not start from random weights
        empty = f"; to leave it empty, use '{key}=\"\"'" if origin is str else ""
        raise ValueError(f"{key} has no value, but must be {wanted}{empty}")
    raise ValueError(f"{key}={value!r} must be {wanted}")
