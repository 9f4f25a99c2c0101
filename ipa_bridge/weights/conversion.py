"""From one system's form into another's: what changes exactly, what is lost, and what cannot be said at all."""

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
    NormForm,
    StructureModuleConfig,
)
from ipa_bridge.kinds import attention_of, has_attention, kind_of, parameter_shapes, replace_attention
from ipa_bridge.weights.dialects import Dialect, Form, layout_of

Arrays = Mapping[str, np.ndarray]
"""Parameters by canonical name."""

LOSSES = {
    "norm": "how the length of a value point is kept from zero (a difference of about 1e-9 in lengths of order 1)",
    "composition_order": "the order in which rotations compose, which is another function in all but special cases",
    "down_z": "the projection of attended pairs, merged into the output projection: the same function up to rounding, "
    "but not to be parted again",
    "point_bias": "biases of the point projections, which are not zero",
    "scalar_bias": "biases of the scalar projections, which are not zero",
}
"""What a conversion may lose, by the names that allow it, the gravest last."""


@dataclass(frozen=True)
class Loss:
    """What a conversion gives up."""

    name: str
    """One of `LOSSES`."""
    reason: str


class Parameters(NamedTuple):
    """A module's arrays by canonical name, and the config they fit."""

    arrays: Arrays
    config: Config


@dataclass(frozen=True, eq=False)
class Conversion:
    """Parameters in a form that a dialect can say."""

    arrays: Arrays
    config: Config
    losses: tuple[Loss, ...] = ()
    notes: tuple[str, ...] = ()
    """What the file cannot say, and its reader must be told."""


def convert(arrays: Arrays, config: Config, dialect: Dialect, *, allow_lossy: Collection[str] = ()) -> Conversion:
    """The same function in a form that a dialect has names for.

    Layout and biases of zero change exactly. Of two layouts the one is taken that loses least of what is not allowed,
    then the less grave, then their own.

    Args:
        arrays: parameters of any form by canonical name.
        config: what they are of.
        dialect: the target.
        allow_lossy: names of `LOSSES` that may happen.

    Raises:
        ValueError: something the dialect cannot say, or a loss that is not allowed.
    """
    unknown = [name for name in allow_lossy if name not in LOSSES]
    if unknown:
        raise ValueError(f"allow_lossy must name {', '.join(LOSSES)}; got {', '.join(unknown)}")
    if not dialect.forms or not has_attention(config):
        dialect.names(config)  # which raises where it has no such module
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
        losses.append(Loss("composition_order", "its transformer composes rotations so that it is not equivariant"))
        fitted = fitted._replace(config=replace(fitted.config, original_composition_order=True))
    _check_allowed(losses, allow_lossy, dialect)
    dialect.names(fitted.config)
    return Conversion(fitted.arrays, fitted.config, tuple(losses), _notes(fitted.config, dialect))


def _check_allowed(losses: Collection[Loss], allow_lossy: Collection[str], dialect: Dialect) -> None:
    forbidden = [loss for loss in losses if loss.name not in allow_lossy]
    if forbidden:
        listed = "".join(f"\n  {loss.name}: {loss.reason}" for loss in forbidden)
        raise ValueError(
            f"{dialect.title} cannot say all of this; allow what may be lost by its name, as --allow-lossy "
            f"{','.join(loss.name for loss in forbidden)} or allow_lossy=:{listed}"
        )


def in_layout(arrays: Arrays, config: Config, layout: Layout) -> Parameters:
    """The same function with the parameters of AlphaFold's other layout, exactly: nothing but an order of numbers.

    Biases and the form of the norm stay, as the config says.
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
    """Prefixes of the attentions in what holds several."""
    end = "trainable_point_weights"
    return [name.removesuffix(end) for name in names if name.endswith(end)]


def _to_multimer(arrays: Arrays, c: IPAConfig) -> dict[str, np.ndarray]:
    """Heads unflattened, keys and values parted; points with the coordinate inside the head."""
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
    """The way back."""
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
"""The one other module of a structure module that the layouts call differently."""

_MONOMER = ("q_scalar", "kv_scalar", "q_point_local", "kv_point_local")


def _fit(given: Parameters, form: Form) -> tuple[Parameters, list[Loss]]:
    """Biases, pair projection and norm as a form has them, and what that loses."""
    losses: list[Loss] = []
    for field, wanted in (("scalar_bias", form.scalar_bias), ("point_bias", form.point_bias)):
        given = _with_biases(given, field, wanted, losses)
    if attention_of(given.config).pair_value_channel is not None and form.pair_value_divisor is None:
        given = _merged(given)
        losses.append(Loss("down_z", f"it has no down_z: {LOSSES['down_z']}"))
    ipa = attention_of(given.config)
    epsilon = form.norm_epsilon if form.epsilon_is_fixed else ipa.norm_epsilon
    if (ipa.norm_form, ipa.norm_epsilon) != (form.norm_form, epsilon):
        if ipa.norm_form != form.norm_form:
            epsilon = form.norm_epsilon
        said = {"add": "√(|x|² + {})", "clamp": "√max(|x|², {}²)"}
        ours, theirs = said[ipa.norm_form].format(ipa.norm_epsilon), said[form.norm_form].format(epsilon)
        losses.append(Loss("norm", f"the length of a value point x is {ours}, there it is {theirs}"))
        changed = replace(ipa, norm_form=cast(NormForm, form.norm_form), norm_epsilon=epsilon)
        given = given._replace(config=replace_attention(given.config, changed))
    return given, losses


def _with_biases(given: Parameters, field: str, wanted: bool, losses: list[Loss]) -> Parameters:
    """Biases of zero where there are none, or none where they are zero."""
    ipa = attention_of(given.config)
    if getattr(ipa, field) == wanted:
        return given
    config = replace_attention(given.config, replace(ipa, **cast(dict[str, Any], {field: wanted})))
    arrays, shapes = dict(given.arrays), parameter_shapes(config)
    if wanted:
        like = next(x for name, x in arrays.items() if name.endswith("output_projection/weights"))
        arrays |= {name: np.zeros(shape, like.dtype) for name, shape in shapes.items() if name not in arrays}
    else:
        dropped = {name: x for name, x in arrays.items() if name not in shapes}
        if any(x.any() for x in dropped.values()):
            names = ", ".join(name for name, x in dropped.items() if x.any())
            losses.append(Loss(field, f"it has none of the {LOSSES[field]}: {names}"))
    return _in_order(arrays, config)


def _merged(given: Parameters) -> Parameters:
    """The attended pair's projection as part of the output's: attention sums to 1, so its bias is the output's."""
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
    """What no loss could mend."""
    ipa, reasons = attention_of(config), []
    form = next(iter(dialect.forms.values()))
    if form.pair_required and ipa.pair_channel is None:
        reasons.append("its attention always reads a pair representation, and scales logits by √(1/3) for it")
    if form.pair_value_divisor is not None:
        width = ipa.pair_channel // form.pair_value_divisor if ipa.pair_channel else 0
        if ipa.pair_value_channel != width:
            has = ipa.pair_value_channel or "none"
            reasons.append(
                f"its down_z is c_z / {form.pair_value_divisor} = {width} wide, and pair_value_channel here is {has}: "
                f"a pair as it is cannot pass through so few channels"
            )
    if form.one_width and ipa.num_scalar_v != ipa.num_scalar_qk:
        reasons.append(
            f"its scalar values are as wide as its queries and keys: num_scalar_v must be {ipa.num_scalar_qk}, not "
            f"{ipa.num_scalar_v}"
        )
    if isinstance(config, StructureModuleConfig):
        if not config.tied_layers:
            reasons.append("one set of weights serves all its layers: tied_layers must be True")
        if dialect.transitions not in (None, config.num_layer_in_transition):
            reasons.append(
                f"its transition has {dialect.transitions} linear layers, not {config.num_layer_in_transition}"
            )
    if reasons:
        raise ValueError(f"{dialect.title} cannot say this:" + "".join(f"\n  {reason}" for reason in reasons))


def _notes(config: Config, dialect: Dialect) -> tuple[str, ...]:
    """What its modules must be told, and what their callers."""
    ipa, notes = attention_of(config), []
    form = dialect.forms[ipa.layout]
    if not form.epsilon_is_fixed and ipa.norm_epsilon != form.norm_epsilon:
        notes.append(f"construct it with {dialect.epsilon_argument}={ipa.norm_epsilon}: a file cannot say so")
    if ipa.position_scale != 1:
        notes.append(f"divide the translations of its frames by {ipa.position_scale:g}: it has no such argument")
    if isinstance(config, IPABlockConfig | IPATransformerConfig):
        block = config.block if isinstance(config, IPATransformerConfig) else config
        if not block.post_norm:
            notes.append("construct it with post_norm=False: a file cannot say so")
    if isinstance(config, IPATransformerConfig) and not config.detach_rotations:
        notes.append("construct it with detach_rotations=False: a file cannot say so")
    if isinstance(config, StructureModuleConfig):
        usual = (
            StructureModuleConfig.alphafold_multimer()
            if ipa.layout == "multimer"
            else StructureModuleConfig.alphafold2()
        )
        for name in ("num_layer", "position_scale"):
            mine = getattr(config, name)
            if not math.isclose(mine, getattr(usual, name)):
                notes.append(f"construct it with {mine:g} for what is called {name} here: a file cannot say so")
    return (*notes, *([dialect.frames] if dialect.frames else []))
