"""Which fields of a config are told, and which only assumed, since neither names nor shapes of parameters tell them.

A field goes by its path: "norm_epsilon" of an attention's config is "ipa.norm_epsilon" of its structure module's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from ipa_bridge.config import (
    Config,
    IPABlockConfig,
    IPAConfig,
    IPATransformerConfig,
    PredictedLDDTConfig,
    StructureModuleConfig,
)

TOLD_BY_SHAPES: dict[type, tuple[str, ...]] = {
    IPAConfig: (
        "num_channel",
        "pair_channel",
        "num_head",
        "num_scalar_qk",
        "num_scalar_v",
        "num_point_qk",
        "num_point_v",
        "layout",
        "scalar_bias",
        "point_bias",
        "pair_value_channel",
    ),
    IPABlockConfig: ("num_layer_in_transition", "transition_factor"),
    IPATransformerConfig: ("num_layer", "num_token", "predict_points"),
    StructureModuleConfig: ("tied_layers", "num_layer_in_transition", "sidechain_channel", "num_residual_block"),
    PredictedLDDTConfig: ("num_channel", "hidden_channel", "num_bin"),
}
"""By kind of config, the fields that names and shapes of parameters tell."""

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
    told = set(TOLD_BY_SHAPES[type(config)])
    if isinstance(config, StructureModuleConfig):
        told |= {"ipa.position_scale"}  # it can only be 1
        told |= set() if config.tied_layers else {"num_layer"}
    for name in ("block", "ipa"):
        if name in {field.name for field in dataclasses.fields(config)}:
            told |= {f"{name}.{path}" for path in told_by_shapes(getattr(config, name))}
    return frozenset(told)


def is_functional(path: str) -> bool:
    """A field of that path is part of what a trained module computes."""
    return path.rpartition(".")[2] not in NOT_FUNCTIONAL


def functional(config: Config) -> dict[str, Any]:
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
    for name in ("block", "ipa"):
        inner = getattr(whole, name, None)
        if name in {field.name for field in dataclasses.fields(whole)} and inner is not None:
            below = path_within(inner, kind)
            return None if below is None else f"{name}.{below}"
    return None


def expression(config: Config, shown: Collection[str] = ()) -> str:
    """Python that makes the config: its constructor, without what is at its default, but with the paths `shown`."""
    parts = []
    for field in dataclasses.fields(config):
        x = getattr(config, field.name)
        if dataclasses.is_dataclass(x):
            prefix = f"{field.name}."
            within = [path.removeprefix(prefix) for path in shown if path.startswith(prefix)]
            parts.append(f"{field.name}={expression(x, within)}")  # type: ignore[arg-type]
        elif field.name in shown or field.default is dataclasses.MISSING or x != field.default:
            parts.append(f"{field.name}={x!r}")
    return f"{type(config).__name__}({', '.join(parts)})"
