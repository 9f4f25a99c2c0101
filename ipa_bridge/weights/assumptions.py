"""Which fields of a config are told, and which only assumed, since neither names nor shapes of parameters tell them.

A field goes by its path: "norm_epsilon" of an attention's config is "ipa.norm_epsilon" of its structure module's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from ipa_bridge.config import Config
from ipa_bridge.kinds import kind_of

NOT_FUNCTIONAL = ("frame_unit", "point_weight_init", "zero_init", "dropout", "attention_dropout", "transition_dropout")
"""Fields of a config that say how a model is called, begins and is trained, and not what a trained one computes."""


def fields(config: Config) -> dict[str, Any]:
    """Every field by its path, those of the configs within included."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        x = getattr(config, field.name)
        if dataclasses.is_dataclass(x):
            found |= {f"{field.name}.{path}": y for path, y in fields(x).items()}  # type: ignore[arg-type]
        else:
            found[field.name] = x
    return found


def frame_units(config: Config) -> dict[str, Any]:
    """The units of frames by their paths, which say not what a module computes but what it must be given."""
    return {path: x for path, x in fields(config).items() if path.rpartition(".")[2] == "frame_unit"}


def told_by_shapes(config: Config) -> frozenset[str]:
    """Paths of the fields that names and shapes of the config's parameters tell."""
    kind = kind_of(config)
    told = {*kind.told_by_shapes, *kind.told_besides(config)}
    if kind.part is not None:
        name = kind.part[0]
        told |= {f"{name}.{path}" for path in told_by_shapes(getattr(config, name))}
    return frozenset(told)


def is_functional(path: str) -> bool:
    """A field of that path is part of what a trained module computes."""
    return path.rpartition(".")[2] not in NOT_FUNCTIONAL


def functional_fields(config: Config) -> dict[str, Any]:
    """The fields that say what a trained module computes, by name: all but how it begins and is trained."""
    found: dict[str, Any] = {}
    for path, x in sorted(fields(config).items(), key=lambda item: item[0].count(".")):
        if is_functional(path):
            found.setdefault(path.rpartition(".")[2], x)
    return found


def path_within(whole: Config, kind: type) -> str | None:
    """The path of the config of that kind within another, ending in a dot, "" for itself; None where there is none."""
    if isinstance(whole, kind):
        return ""
    part = kind_of(whole).part
    if part is None:
        return None
    below = path_within(getattr(whole, part[0]), kind)
    return None if below is None else f"{part[0]}.{below}"


def part_of(whole: Config, assumed: Collection[str], kind: type) -> tuple[Config, frozenset[str]] | None:
    """The config of a module of that kind within a whole's, and its assumed fields; None where there is none."""
    prefix = path_within(whole, kind)
    if prefix is None:
        return None
    part = whole
    for name in prefix.split(".")[:-1]:
        part = getattr(part, name)
    return part, frozenset(path.removeprefix(prefix) for path in assumed if path.startswith(prefix))


def constructor_code(config: Config, shown: Collection[str] = ()) -> str:
    """Python that makes the config: its constructor, without what is at its default, but with the paths `shown`."""
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
