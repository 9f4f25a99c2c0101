"""Config fields: those that names and shapes of parameters determine, and those that can only be assumed.

A field is identified by its path: an attention's "norm_epsilon" is "ipa.norm_epsilon" in its structure module's config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from ipa_bridge.config import Config
from ipa_bridge.kinds import kind_of

NOT_FUNCTIONAL = ("frame_unit", "point_weight_init", "zero_init", "dropout", "attention_dropout", "transition_dropout")
"""Config fields that describe a model's initialisation, training or input unit, not what the trained model computes."""


def fields(config: Config) -> dict[str, Any]:
    """Every field by its path, including those of nested configs."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        x = getattr(config, field.name)
        if dataclasses.is_dataclass(x):
            found |= {f"{field.name}.{path}": y for path, y in fields(x).items()}  # type: ignore[arg-type]
        else:
            found[field.name] = x
    return found


def frame_units(config: Config) -> dict[str, Any]:
    """The frame_unit fields by path; they describe a module's input, not what it computes."""
    return {path: x for path, x in fields(config).items() if path.rpartition(".")[2] == "frame_unit"}


def told_by_shapes(config: Config) -> frozenset[str]:
    """Paths of the fields that names and shapes of the module's parameters determine."""
    kind = kind_of(config)
    told = {*kind.told_by_shapes, *kind.told_besides(config)}
    if kind.part is not None:
        name = kind.part[0]
        told |= {f"{name}.{path}" for path in told_by_shapes(getattr(config, name))}
    return frozenset(told)


def is_functional(path: str) -> bool:
    """Returns True if the field at a path affects what a trained module computes."""
    return path.rpartition(".")[2] not in NOT_FUNCTIONAL


def functional_fields(config: Config) -> dict[str, Any]:
    """Values, by name, of the fields that affect what a trained module computes: all but `NOT_FUNCTIONAL`."""
    found: dict[str, Any] = {}
    for path, x in sorted(fields(config).items(), key=lambda item: item[0].count(".")):
        if is_functional(path):
            found.setdefault(path.rpartition(".")[2], x)
    return found


def path_within(whole: Config, kind: type) -> str | None:
    """Path of the nested config of a kind, ending in a dot; "" for the config itself, None if there is none."""
    if isinstance(whole, kind):
        return ""
    part = kind_of(whole).part
    if part is None:
        return None
    below = path_within(getattr(whole, part[0]), kind)
    return None if below is None else f"{part[0]}.{below}"


def part_of(whole: Config, assumed: Collection[str], kind: type) -> tuple[Config, frozenset[str]] | None:
    """The nested config of a kind, with its assumed fields; None if there is none."""
    prefix = path_within(whole, kind)
    if prefix is None:
        return None
    part = whole
    for name in prefix.split(".")[:-1]:
        part = getattr(part, name)
    return part, frozenset(path.removeprefix(prefix) for path in assumed if path.startswith(prefix))


def constructor_code(config: Config, shown: Collection[str] = ()) -> str:
    """Python code that makes the config; fields at their defaults are left out unless their paths are in `shown`."""
    parts = []
    for field in dataclasses.fields(config):
        x = getattr(config, field.name)
        if dataclasses.is_dataclass(x):
            prefix = f"{field.name}."
            within = [path.removeprefix(prefix) for path in shown if path.startswith(prefix)]
            parts.append(f"{field.name}={constructor_code(x, within)}")  # type: ignore[arg-type]
        elif field.name in shown or field.default is dataclasses.MISSING or x != field.default:
            parts.append(f"{field.name}={x!r}")
    return f"{type(config).__name__}({', '.join(parts)})"
