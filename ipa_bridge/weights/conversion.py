"""Conversion from one system's form to another's: exact changes, losses that must be allowed, and refusals."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import numpy as np

from ipa_bridge.config import (
    Config,
    IPABlockConfig,
    IPAConfig,
    IPATransformerConfig,
    Layout,
    StructureModuleConfig,
)
from ipa_bridge.kinds import attention_of, has_attention, kind_of, parameter_shapes, replace_attention
from ipa_bridge.weights.dialects import OTHERS, Dialect, Form, layout_of

Arrays = Mapping[str, np.ndarray]
"""Parameters by canonical name."""

LOSSES = {
    "norm": "the formula that keeps the length of a value point from zero (changes lengths of order 1 by about 1e-9)",
    "composition_order": "the order in which rotations compose (another function, except in special cases)",
    "down_z": "the projection of attended pairs, merged into the output projection (the same function up to rounding, "
    "but the two cannot be separated again)",
    "point_bias": "non-zero biases of the point projections",
    "scalar_bias": "non-zero biases of the scalar projections",
}
"""Possible losses of a conversion, by the name that allows each; the most serious loss is last."""


@dataclass(frozen=True)
class Loss:
    """One loss of a conversion."""

    name: str
    """One of `LOSSES`."""
    reason: str


class Parameters(NamedTuple):
    """A module's arrays by canonical name, and the config they fit."""

    arrays: Arrays
    config: Config


@dataclass(frozen=True, eq=False)
class Conversion:
    """Parameters in a form that a dialect can represent."""

    arrays: Arrays
    config: Config
    losses: tuple[Loss, ...] = ()
    notes: tuple[str, ...] = ()
    """Facts that a reader of the file needs but the file cannot store."""


def convert(arrays: Arrays, config: Config, dialect: Dialect, *, allow_lossy: Collection[str] = ()) -> Conversion:
    """Converts parameters to a form that a dialect can represent; the function stays the same, except for losses.

    Changes of layout, and biases of zero that are added or removed, are no loss. If the dialect has two layouts, the
    one with fewer losses that are not allowed is chosen, then the one with less serious losses, then the layout that
    the parameters have.

    Args:
        arrays: parameters of any form by canonical name.
        config: the config of these parameters.
        dialect: the target.
        allow_lossy: losses to allow, by their names in `LOSSES`.

    Raises:
        ValueError: the dialect cannot represent the parameters, or a loss is not allowed.
    """
    unknown = [name for name in allow_lossy if name not in LOSSES]
    if unknown:
        raise ValueError(f"allow_lossy must name {', '.join(LOSSES)}; got {', '.join(unknown)}")
    if not dialect.forms or not has_attention(config):
        dialect.names(config)  # raises if the dialect has no such module
        return Conversion(arrays, config)
    own = layout_of(config)
    layouts = sorted(dialect.forms, key=lambda layout: layout != own)
    if type(config) not in dialect.rows:
        raise ValueError(f"{dialect.title} has no {kind_of(config).title} of its own to convert to")
    _refuse(config, dialect)
    attempts = [_fit(in_layout(arrays, config, layout), dialect.forms[layout]) for layout in layouts]

    def gravity(attempt: tuple[Parameters, list[Loss]]) -> tuple[int, list[int]]:
        names = [loss.name for loss in attempt[1]]
        return len(set(names) - set(allow_lossy)), sorted((list(LOSSES).index(name) for name in names), reverse=True)

    fitted, losses = min(attempts, key=gravity)
    if isinstance(fitted.config, IPATransformerConfig) and not fitted.config.original_composition_order:
        losses.append(Loss("composition_order", "the target composes rotations in an order that is not equivariant"))
        fitted = fitted._replace(config=replace(fitted.config, original_composition_order=True))
    _check_allowed(losses, allow_lossy, dialect)
    dialect.names(fitted.config)
    return Conversion(fitted.arrays, fitted.config, tuple(losses), _notes(fitted.config, dialect))


def _check_allowed(losses: Collection[Loss], allow_lossy: Collection[str], dialect: Dialect) -> None:
    forbidden = [loss for loss in losses if loss.name not in allow_lossy]
    if forbidden:
        listed = "".join(f"\n  {loss.name}: {loss.reason}" for loss in forbidden)
        names = [loss.name for loss in forbidden]
        raise ValueError(
            f"{dialect.title} cannot represent all of these weights; to allow the losses, pass --allow-lossy "
            f"{','.join(names)} (in Python: allow_lossy={names}):{listed}"
        )


def in_layout(arrays: Arrays, config: Config, layout: Layout) -> Parameters:
    """Rearranges parameters into one of AlphaFold's two layouts; this only changes the order of numbers.

    Biases and the form of the norm stay as they are.
    """
    ipa = attention_of(config)
    if ipa.layout == layout:
        return Parameters(arrays, config)
    convert = _to_multimer if layout == "multimer" else _to_monomer
    changed = replace_attention(config, replace(ipa, layout=layout))
    if isinstance(config, IPAConfig):
        return _in_order(convert(arrays, ipa), changed)
    found: dict[str, np.ndarray] = {}
    prefixes = _attentions(arrays)
    for prefix in prefixes:
        part = {n.removeprefix(prefix): x for n, x in arrays.items() if n.startswith(prefix)}
        found |= {prefix + name: x for name, x in convert(part, ipa).items()}
    found |= {
        re.sub(rf"^(fold_iteration(?:_\d+)?)/{_UPDATE[ipa.layout]}/", rf"\1/{_UPDATE[layout]}/", name): x
        for name, x in arrays.items()
        if not any(name.startswith(prefix) for prefix in prefixes)
    }
    return _in_order(found, changed)


def _in_order(arrays: Arrays, config: Config) -> Parameters:
    """The arrays in the order of the config's parameters."""
    return Parameters({name: arrays[name] for name in parameter_shapes(config)}, config)


def _attentions(names: Collection[str]) -> list[str]:
    """Prefixes of all attentions among the names."""
    end = "trainable_point_weights"
    return [name.removesuffix(end) for name in names if name.endswith(end)]


def _to_multimer(arrays: Arrays, c: IPAConfig) -> dict[str, np.ndarray]:
    """Unflattens heads, splits keys from values, and moves the coordinate axis of points inside the head axis."""
    h, qk, p = c.num_head, c.num_scalar_qk, c.num_point_qk
    found = {name: x for name, x in arrays.items() if name.split("/")[0] not in _MONOMER}
    for name, x in arrays.items():
        module, _, leaf = name.partition("/")
        if module not in _MONOMER:
            continue
        inputs = x.shape[: leaf == "weights"]
        if module.endswith("scalar"):
            heads = x.reshape(*inputs, h, -1)
            parts = {"q": heads} if module == "q_scalar" else {"k": heads[..., :qk], "v": heads[..., qk:]}
            found |= {f"{letter}_scalar_projection/{leaf}": part for letter, part in parts.items()}
        else:
            heads = np.moveaxis(x.reshape(*inputs, 3, h, -1), -3, -2)
            parts = {"q": heads} if module == "q_point_local" else {"k": heads[..., :p], "v": heads[..., p:]}
            for letter, part in parts.items():
                found[f"{letter}_point_projection/point_projection/{leaf}"] = part.reshape(*inputs, h, -1)
    return found


def _to_monomer(arrays: Arrays, c: IPAConfig) -> dict[str, np.ndarray]:
    """Inverts `_to_multimer`."""
    h = c.num_head
    found = {name: x for name, x in arrays.items() if "_projection/" not in name or name.startswith("output_")}
    for leaf in ("weights", "bias"):
        scalars = [arrays.get(f"{x}_scalar_projection/{leaf}") for x in "qkv"]
        if scalars[0] is not None:
            q, k, v = cast(list[np.ndarray], scalars)
            inputs = q.shape[: leaf == "weights"]
            found[f"q_scalar/{leaf}"] = q.reshape(*inputs, -1)
            found[f"kv_scalar/{leaf}"] = np.concatenate([k, v], -1).reshape(*inputs, -1)
        points = [arrays.get(f"{x}_point_projection/point_projection/{leaf}") for x in "qkv"]
        if points[0] is not None:
            q, k, v = (
                np.moveaxis(x.reshape(*x.shape[: leaf == "weights"], h, 3, -1), -2, -3)
                for x in cast(list[np.ndarray], points)
            )
            inputs = q.shape[: leaf == "weights"]
            found[f"q_point_local/{leaf}"] = q.reshape(*inputs, -1)
            found[f"kv_point_local/{leaf}"] = np.concatenate([k, v], -1).reshape(*inputs, -1)
    return found


_UPDATE = {"monomer": "affine_update", "multimer": "quat_rigid/rigid"}
"""Name of the backbone update: outside the attention, the only module whose name depends on the layout."""

_MONOMER = ("q_scalar", "kv_scalar", "q_point_local", "kv_point_local")


def _fit(given: Parameters, form: Form) -> tuple[Parameters, list[Loss]]:
    """Changes biases, pair projection and norm to those of a form; also returns the losses."""
    losses: list[Loss] = []
    biases = {field: getattr(form, field) for field in ("scalar_bias", "point_bias")}
    biases["attention_2d_bias"] = form.others.get("attention_2d_bias", True)
    for field, has_bias in biases.items() if not form.lacks_biases_as(attention_of(given.config)) else ():
        given = _with_biases(given, field, has_bias, losses)
    ipa = attention_of(given.config)
    if ipa.pair_value_channel is not None and not ipa.pair_value_per_head and form.pair_value_divisor is None:
        given = _merged(given)
        losses.append(Loss("down_z", f"the target has no down_z: {LOSSES['down_z']}"))
    ipa = attention_of(given.config)
    epsilon = form.norm_epsilon if form.epsilon_is_fixed else ipa.norm_epsilon
    if (ipa.norm_form, ipa.norm_epsilon) != (form.norm_form, epsilon):
        if ipa.norm_form != form.norm_form:
            epsilon = form.norm_epsilon
        formula = {"add": "√(|x|² + {})", "clamp": "√max(|x|², {}²)"}
        ours, theirs = formula[ipa.norm_form].format(ipa.norm_epsilon), formula[form.norm_form].format(epsilon)
        losses.append(Loss("norm", f"the length of a value point x is {ours} here and {theirs} in the target"))
        changed = replace(ipa, norm_form=form.norm_form, norm_epsilon=epsilon)
        given = given._replace(config=replace_attention(given.config, changed))
    return given, losses


def _with_biases(given: Parameters, field: str, has_bias: bool | None, losses: list[Loss]) -> Parameters:
    """Adds biases of zero, or removes biases; removing biases that are not zero is a loss. None leaves them."""
    ipa = attention_of(given.config)
    if has_bias is None or getattr(ipa, field) == has_bias:
        return given
    config = replace_attention(given.config, replace(ipa, **cast(dict[str, Any], {field: has_bias})))
    arrays, shapes = dict(given.arrays), parameter_shapes(config)
    if has_bias:
        like = next(x for name, x in arrays.items() if name.endswith("output_projection/weights"))
        arrays |= {name: np.zeros(shape, like.dtype) for name, shape in shapes.items() if name not in arrays}
    else:
        dropped = {name: x for name, x in arrays.items() if name not in shapes}
        if any(x.any() for x in dropped.values()):
            names = ", ".join(name for name, x in dropped.items() if x.any())
            losses.append(Loss(field, f"the target has no place for {LOSSES[field]}: {names}"))
    return _in_order(arrays, config)


def _merged(given: Parameters) -> Parameters:
    """Merges the projection of attended pairs (`down_z`) into the output projection.

    Attention weights sum to 1, so the bias of `down_z` adds a constant to the output, which goes into its bias.
    """
    ipa = attention_of(given.config)
    arrays = dict(given.arrays)
    h, narrow = ipa.num_head, cast(int, ipa.pair_value_channel)
    for prefix in [""] if isinstance(given.config, IPAConfig) else _attentions(arrays):
        down, bias = (arrays.pop(f"{prefix}down_z/{leaf}").astype(np.float64) for leaf in ("weights", "bias"))
        output = arrays[f"{prefix}output_projection/weights"]
        others, pair = np.split(output.astype(np.float64), [len(output) - h * narrow])
        pair = pair.reshape(h, narrow, -1)
        wide = np.einsum("zn,hnc->hzc", down, pair).reshape(-1, pair.shape[-1])
        arrays[f"{prefix}output_projection/weights"] = np.concatenate([others, wide]).astype(output.dtype)
        old = arrays[f"{prefix}output_projection/bias"]
        arrays[f"{prefix}output_projection/bias"] = (old + np.einsum("n,hnc->c", bias, pair)).astype(old.dtype)
    return _in_order(arrays, replace_attention(given.config, replace(ipa, pair_value_channel=None)))


def _refuse(config: Config, dialect: Dialect) -> None:
    """Raises if the dialect cannot represent a module of this config even with losses."""
    ipa, reasons = attention_of(config), []
    form = next(iter(dialect.forms.values()))
    if form.pair_required and ipa.pair_channel is None:
        reasons.append("its attention always reads a pair representation and scales logits by √(1/3)")
    if form.pair_value_divisor is not None:
        width = ipa.pair_channel // form.pair_value_divisor if ipa.pair_channel else 0
        if ipa.pair_value_channel != width:
            has = ipa.pair_value_channel or "none"
            reasons.append(
                f"its down_z is c_z / {form.pair_value_divisor} = {width} wide, and pair_value_channel here is {has}: "
                f"the two must be equal"
            )
    if form.one_width and ipa.num_scalar_v != ipa.num_scalar_qk:
        reasons.append(
            f"its scalar values are as wide as its queries and keys: num_scalar_v must be {ipa.num_scalar_qk}, not "
            f"{ipa.num_scalar_v}"
        )
    for field, usual in OTHERS.items():
        theirs, here = form.others.get(field, usual), getattr(ipa, field)
        if field == "attention_2d_bias" and not here:  # `_fit` adds a bias of zero
            continue
        if theirs not in (None, here) and not (ipa.pair_channel is None and field in _OF_PAIR_BIAS):
            reasons.append(f"its attention has {field}={theirs!r}, and here it is {here!r}")
    terms = form.logit_terms or (2 if ipa.pair_channel is None else 3)
    if ipa.num_logit_terms != terms:
        reasons.append(f"it scales its logits by √(1/{terms}), and logit_terms is {ipa.num_logit_terms} here")
    reasons += dialect.misfits(ipa)
    if isinstance(config, StructureModuleConfig):
        reasons += _of_another_structure(config, dialect)
        if dialect.transitions not in (None, config.num_layer_in_transition):
            reasons.append(
                f"its transition has {dialect.transitions} linear layers, not {config.num_layer_in_transition}"
            )
    if reasons:
        raise ValueError(f"{dialect.title} cannot represent this:" + "".join(f"\n  {reason}" for reason in reasons))


_OF_PAIR_BIAS = ("pair_bias", "attention_2d_bias")
"""Config fields that mean nothing without a pair representation."""


def _of_another_structure(config: StructureModuleConfig, dialect: Dialect) -> list[str]:
    """Reasons why none of a dialect's structure modules has a config's form."""
    reasons = []
    for field, value in dialect.structure.items():
        mine = getattr(config, field)
        if field == "tied_layers" and mine != value:
            whose = "one set of weights serves all its layers" if value else "each of its layers has its own weights"
            reasons.append(f"{whose}: tied_layers must be {value}")
        elif mine != value:
            reasons.append(f"its structure module has {field}={value!r}, not {mine!r}")
    return reasons + [reason for reason in (dialect.refuse(config),) if reason]


def _notes(config: Config, dialect: Dialect) -> tuple[str, ...]:
    """Sentences on what constructors and callers of the target's modules need but the file cannot store."""
    ipa, notes = attention_of(config), []
    form = dialect.forms[ipa.layout]
    if not form.epsilon_is_fixed and ipa.norm_epsilon != form.norm_epsilon:
        notes.append(
            f"construct the module with {dialect.epsilon_argument}={ipa.norm_epsilon}, which a file cannot store"
        )
    if ipa.position_scale != 1:
        notes.append(
            f"divide the translations of its frames by {ipa.position_scale:g}, as the module has no argument for this"
        )
    if isinstance(config, IPABlockConfig | IPATransformerConfig):
        block = config.block if isinstance(config, IPATransformerConfig) else config
        if not block.post_norm:
            notes.append("construct the module with post_norm=False, which a file cannot store")
    if isinstance(config, IPATransformerConfig) and config.detach_rotations != dialect.detach_argument[1]:
        name = dialect.detach_argument[0]
        notes.append(f"construct the module with {name}={config.detach_rotations}, which a file cannot store")
    if isinstance(config, StructureModuleConfig):
        notes += _structure_notes(config, dialect)
    return (*notes, *([dialect.frames] if dialect.frames else []))


def _structure_notes(config: StructureModuleConfig, dialect: Dialect) -> list[str]:
    """Sentences on what a structure module's constructor needs, where it differs from the published model's."""
    usual, notes = dialect.published(config.ipa.layout), []
    names = ("position_scale", "smallest_angle_length", "skip_connection", "detach_rotations")
    for name in (*(("num_layer",) if config.tied_layers else ()), *names):
        mine = getattr(config, name)
        if not math.isclose(mine, getattr(usual, name)):
            shown = mine if isinstance(mine, bool) else f"{mine:g}"
            notes.append(f"construct the module with {shown} for our {name}, which a file cannot store")
    return notes
