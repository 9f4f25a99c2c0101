"""Algorithm 22 with options: each option is right by default, and its other values are known mistakes.

The right formula equals the oracle, as a test shows. It is written once for numpy, PyTorch and JAX, so that gradients
can be taken through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ipa_bridge.config import IPAConfig
from ipa_parity.checking.rounding import round_to

Array = Any
"""An array of numpy, PyTorch or JAX."""


@dataclass(frozen=True)
class Formula:
    """A function that an attention may compute, as a choice per step of Algorithm 22. The defaults are right."""

    heads: str = "outer"  # "inner": channels of a projection lie as (C, H)
    scalar_packing: str = "keys first"  # "values first"; "all keys first": packed for all heads together
    point_packing: str = "keys first"
    point_order: str = "right"  # "other": (P, 3) instead of (3, P); "other layout": of the other of AlphaFold's
    roles: str = "right"  # "queries and keys", "query and key points", "keys and values": these are exchanged
    biases: str = "kept"  # of the projections: "dropped", "no points'", "no keys'"
    rotation: str = "right"  # "transposed"
    qk_frame: str = "global"  # "local", "rotated", "shifted", "shifted first", "inverse", "transposed"
    v_frame: str = "global"
    back: str = "right"  # "none", "rotated", "shifted", "rotated first", "not transposed", "forward"
    unit: float = 1.0  # factor on translations
    scalar_scale: str = "right"  # "missing", "1/C", "all heads"
    terms: int | None = None  # T of √(1/T)
    scaled: tuple[str, ...] = ("scalars", "bias", "points")  # terms multiplied by √(1/T)
    distance: str = "right"  # "squared", "unsquared", "unsquared without ε", "unsquared over points"
    w_c: str = "right"  # a row of `_w_c`
    half: float = 0.5
    sign: float = -1.0
    spread: str = "right"  # "tiled": weights of heads over (head, point) as if over (point, head)
    gamma: str = "right"  # a row of `_head_weights`
    bias: str = "right"  # "dropped", "transposed", "scaled twice", "without its own bias"
    mask: str = (
        "right"  # "inverted", "ignored", "queries", "both", "too weak", "after softmax", "multiplied", "swamped"
    )
    masked_rows: str = "all keys"  # "valid keys": what masked queries attend to; matters where columns are summed
    softmax: str = "keys"  # "queries", "heads"
    values: str = "right"  # "transposed", "own": of scalars and points; "own scalars"
    pair_values: str = "right"  # "transposed", "column sums", "zero"
    norm: str = "right"  # "add", "clamp", "capped", "squared", "global", "zero"
    epsilon: float | None = None  # of the norm
    order: tuple[str, ...] = ("o", "x", "y", "z", "norms", "o_pair")  # "points": (H, P, 3) instead of x, y, z
    feature_heads: str = "outer"  # "inner": features lie as (C, H)
    output: str = "right"  # "without bias", "with the input"
    factors: Mapping[str, float] = field(
        default_factory=dict
    )  # term ("scalars", "bias", "points", "γ", "norms") to factor
    stop: frozenset[str] = frozenset()  # where gradients end
    rounded: Mapping[str, str] = field(default_factory=dict)  # stage to the format of its operands


PROJECTED = ("heads", "scalar_packing", "point_packing", "point_order", "roles", "biases")
"""Fields that the projections depend on, beside those of rounding and gradients."""


class Inputs(NamedTuple):
    """Inputs of an attention, in one framework's arrays."""

    single: Array
    pair: Array | None
    rotation: Array
    translation: Array
    mask: Array  # of the activations' dtype


class Backend(NamedTuple):
    """A framework's array functions, which share numpy's names, and its end of gradients."""

    xp: Any
    stop: Callable[[Array], Array] = lambda x: x


NUMPY = Backend(np)


def torch_backend() -> Backend:
    """PyTorch's functions."""
    import torch

    return Backend(torch, lambda x: x.detach())


def jax_backend() -> Backend:
    """JAX's functions."""
    import jax

    return Backend(jax.numpy, jax.lax.stop_gradient)


def compute(
    formula: Formula, parameters: Mapping[str, Array], config: IPAConfig, inputs: Inputs, backend: Backend = NUMPY
) -> dict[str, Array]:
    """Stages of the attention under the oracle's names, with `points` for the local ones."""
    return attend(formula, parameters, config, inputs, project(formula, parameters, config, inputs, backend), backend)


def project(
    formula: Formula, parameters: Mapping[str, Array], config: IPAConfig, inputs: Inputs, backend: Backend = NUMPY
) -> tuple[Array, ...]:
    """q, k, v as (*B, N, H, C) and local query, key and value points as (*B, N, H, P, 3) (lines 1–3)."""
    linear = partial(_linear, formula, parameters, _stopped(formula, backend, "single", inputs.single))
    scalars, points = partial(_headed, formula, config), partial(_points, formula, config)
    if config.layout == "multimer":
        q, k, v = (scalars(linear(f"{x}_scalar_projection")) for x in "qkv")
        q_points, k_points, v_points = (points(linear(f"{x}_point_projection/point_projection")) for x in "qkv")
    else:
        q, q_points = scalars(linear("q_scalar")), points(linear("q_point_local"))
        packed = linear("kv_scalar")[..., None, :], formula.scalar_packing, config.num_scalar_qk
        k, v = (scalars(x[..., 0, :]) for x in _unpack(config, *packed))
        by_coordinate = _by_coordinate(formula, config, linear("kv_point_local"))
        unpacked = _unpack(config, by_coordinate, formula.point_packing, config.num_point_qk)
        k_points, v_points = (_headed(formula, config, x).swapaxes(-3, -2).swapaxes(-2, -1) for x in unpacked)
    if "rotary_frequencies" in parameters:
        q, k = (_turned(x, parameters["rotary_frequencies"], backend.xp) for x in (q, k))
    if formula.roles == "queries and keys":
        q, k, q_points, k_points = k, q, k_points, q_points
    elif formula.roles == "query and key points":
        q_points, k_points = k_points, q_points
    elif formula.roles == "keys and values":
        k, v = v, k
    return q, k, v, q_points, k_points, v_points


def attend(
    formula: Formula,
    parameters: Mapping[str, Array],
    config: IPAConfig,
    inputs: Inputs,
    projections: tuple[Array, ...],
    backend: Backend = NUMPY,
) -> dict[str, Array]:
    """Lines 4–11, from the projections."""
    stopped, low, xp = partial(_stopped, formula, backend), partial(_low, formula), backend.xp
    q, k, v, *local = projections
    rotation = stopped("rotations", inputs.rotation)
    rotation = low("points", rotation if formula.rotation == "right" else rotation.swapaxes(-1, -2))
    translation = stopped("translations", inputs.translation) * (formula.unit / config.position_scale)
    placed = partial(_placed, rotation, translation, xp)
    q_points, k_points = (placed(formula.qk_frame, stopped("q, k points", low("points", x))) for x in local[:2])
    v_points = placed(formula.v_frame, low("points", local[2]))
    pair = None if inputs.pair is None else stopped("pair", inputs.pair)
    logits = _logits(formula, parameters, config, (q, k, q_points, k_points), pair, backend)
    attention = stopped("attention", _attention(formula, logits, inputs.mask, backend))
    weights = low("attention", attention)
    axes = {"right": ("hij", "j"), "transposed": ("hji", "j"), "own": ("hij", "i")}.get(formula.values, ("hij", "j"))
    scalar_axes = ("hij", "i") if formula.values == "own scalars" else axes
    o = xp.einsum("...{},...{}hc->...ihc".format(*scalar_axes), weights, low("values", v))  # line 9
    placed_points = xp.einsum("...{},...{}hpx->...ihpx".format(*axes), weights, low("values", v_points))  # line 10
    back = stopped("inverse frames", rotation), stopped("inverse frames", translation)
    points = _taken_back(formula, *back, low("inverse", placed_points), xp)
    norms = formula.factors.get("norms", 1.0) * stopped(
        "norms", _norms(formula, config, placed_points if formula.norm == "global" else points, xp)
    )
    stages = {"logits": logits, "attention": attention, "o": o, "points": points, "norms": norms}
    if pair is not None:
        stages["o_pair"] = _pair_values(formula, parameters, config, weights, stopped("o_pair", pair), xp)
    return stages | {"out": _output(formula, parameters, stages, inputs.single, xp)}


def _stopped(formula: Formula, backend: Backend, where: str, x: Array) -> Array:
    return backend.stop(x) if where in formula.stop else x


def _low(formula: Formula, stage: str, x: Array) -> Array:
    """The array in the format to which the formula rounds a stage's operands."""
    to = formula.rounded.get(stage) or formula.rounded.get("everything")
    return round_to(to, x) if to else x


def _product(formula: Formula, stage: str, x: Array, weights: Array) -> Array:
    """A matrix product whose operands, and result unless it is TF32's, are in the stage's format."""
    product = _low(formula, stage, x) @ _low(formula, stage, weights)
    return product if "tf32" in formula.rounded.values() else _low(formula, stage, product)


def _linear(formula: Formula, parameters: Mapping[str, Array], single: Array, name: str) -> Array:
    weights = parameters[f"{name}/weights"]
    weights = weights.reshape((weights.shape[0], -1))
    output = _product(formula, "projections", single, weights)
    bias = parameters.get(f"{name}/bias")
    if bias is None or formula.biases == "dropped" or (formula.biases == "no points'" and "point" in name):
        return output
    bias = bias.reshape(-1)
    if formula.biases == "no keys'" and name.startswith("k"):
        bias = 0 * bias
    return output + bias


def _unpack(config: IPAConfig, x: Array, packing: str, keys: int) -> tuple[Array, Array]:
    """Keys and values (*B, N, K, H·…) of packed projections (*B, N, K, H·(keys + values))."""
    h = config.num_head
    values = x.shape[-1] // h - keys
    if packing == "all keys first":
        return x[..., : h * keys], x[..., h * keys :]
    by_head = x.reshape((*x.shape[:-1], h, keys + values))
    k, v = by_head[..., :keys], by_head[..., keys:]
    if packing == "values first":
        k, v = by_head[..., values:], by_head[..., :values]
    return tuple(part.reshape((*x.shape[:-1], -1)) for part in (k, v))


def _headed(formula: Formula, config: IPAConfig, x: Array) -> Array:
    """(…, H·C) as (…, H, C)."""
    if formula.heads == "inner":
        return x.reshape((*x.shape[:-1], -1, config.num_head)).swapaxes(-1, -2)
    return x.reshape((*x.shape[:-1], config.num_head, -1))


def _points(formula: Formula, config: IPAConfig, x: Array) -> Array:
    """Points (*B, N, H, P, 3) of a projection (*B, N, 3·H·P) that holds no others."""
    if config.layout == "multimer":
        if formula.point_order == "other layout":
            return x.reshape((*x.shape[:-1], 3, config.num_head, -1)).swapaxes(-3, -2).swapaxes(-2, -1)
        x = x.reshape((*x.shape[:-1], config.num_head, -1))
        if formula.point_order == "other":
            return x.reshape((*x.shape[:-1], -1, 3))
        return x.reshape((*x.shape[:-1], 3, -1)).swapaxes(-1, -2)
    return _headed(formula, config, _by_coordinate(formula, config, x)).swapaxes(-3, -2).swapaxes(-2, -1)


def _by_coordinate(formula: Formula, config: IPAConfig, x: Array) -> Array:
    """The monomer layout's points (…, 3·H·P) as (…, 3, H·P)."""
    if formula.point_order == "other":
        return x.reshape((*x.shape[:-1], -1, 3)).swapaxes(-1, -2)
    if formula.point_order == "other layout":
        by_head = x.reshape((*x.shape[:-1], config.num_head, 3, -1)).swapaxes(-3, -2)
        return by_head.reshape((*x.shape[:-1], 3, -1))
    return x.reshape((*x.shape[:-1], 3, -1))


def _turned(x: Array, frequencies: Array, xp: Any) -> Array:
    """The rotary embedding: channels 2i and 2i + 1 turn by n · frequencies[i]."""
    angle = xp.cumsum(xp.ones_like(x[..., :1]), -3) - 1
    angle = angle * frequencies
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], xp.cos(angle), xp.sin(angle)
    return xp.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)


def _placed(rotation: Array, translation: Array, xp: Any, frame: str, x: Array) -> Array:
    """Points (*B, N, H, P, 3) in the frame that the formula puts them into."""
    t = translation[..., None, None, :]
    if frame == "local":
        return x
    if frame == "shifted":
        return x + t
    if frame == "transposed":
        return xp.einsum("...nyx,...nhpy->...nhpx", rotation, x) + t
    if frame in ("inverse", "shifted first"):
        axes = "...nyx" if frame == "inverse" else "...nxy"
        return xp.einsum(f"{axes},...nhpy->...nhpx", rotation, x - t if frame == "inverse" else x + t)
    return xp.einsum("...nxy,...nhpy->...nhpx", rotation, x) + (0 if frame == "rotated" else t)


def _taken_back(formula: Formula, rotation: Array, translation: Array, x: Array, xp: Any) -> Array:
    """Points back in the local frame (line 10)."""
    t = translation[..., None, None, :]
    if formula.back == "none":
        return x
    if formula.back == "shifted":
        return x - t
    if formula.back in ("forward", "not transposed"):
        turned = xp.einsum("...nxy,...nhpy->...nhpx", rotation, x if formula.back == "forward" else x - t)
        return turned + t if formula.back == "forward" else turned
    turned = xp.einsum("...nyx,...nhpy->...nhpx", rotation, x if formula.back != "right" else x - t)
    return turned - t if formula.back == "rotated first" else turned


def _logits(
    formula: Formula,
    parameters: Mapping[str, Array],
    config: IPAConfig,
    queries_and_keys: tuple[Array, ...],
    pair: Array | None,
    backend: Backend,
) -> Array:
    """The logits of line 7, without the mask."""
    low, xp = partial(_low, formula), backend.xp
    q, k, q_points, k_points = queries_and_keys
    width = {"right": config.num_scalar_qk, "missing": 1, "1/C": config.num_scalar_qk**2}
    width["all heads"] = config.num_scalar_qk * config.num_head
    scalars = _product(formula, "products", q.swapaxes(-2, -3), k.swapaxes(-2, -3).swapaxes(-1, -2))
    scalars = scalars / math.sqrt(width[formula.scalar_scale])
    gamma = _stopped(formula, backend, "γ", parameters["trainable_point_weights"]) * formula.factors.get("γ", 1.0)
    if formula.spread == "tiled":
        gamma = xp.stack([gamma] * config.num_point_qk).reshape((config.num_head, config.num_point_qk))
    weight = _w_c(formula, config) * _head_weights(formula, config, gamma, xp)
    weighted = _distance(formula, config, q_points, k_points, weight, xp)
    terms = {"scalars": scalars, "points": formula.sign * formula.half * weighted}
    if config.pair_channel is not None and config.pair_bias and formula.bias != "dropped":
        terms["bias"] = _bias(formula, parameters, _stopped(formula, backend, "pair bias", pair), xp)
    root = math.sqrt(1 / (formula.terms or config.num_logit_terms))
    scaled = {name: root * x if name in formula.scaled else x for name, x in terms.items()}
    if formula.bias == "scaled twice":
        scaled["bias"] = root * scaled["bias"]
    return low("logits", sum(x * formula.factors.get(name, 1.0) for name, x in scaled.items()))


def _bias(formula: Formula, parameters: Mapping[str, Array], pair: Any, xp: Any) -> Array:
    axes = "jic" if formula.bias == "transposed" else "ijc"
    weights = _low(formula, "bias", parameters["attention_2d/weights"])
    bias = xp.einsum(f"...{axes},ch->...hij", _low(formula, "bias", pair), weights)  # line 4
    own = parameters.get("attention_2d/bias")
    return bias if own is None or formula.bias == "without its own bias" else bias + own[:, None, None]


def _distance(formula: Formula, config: IPAConfig, q_points: Array, k_points: Array, weight: Array, xp: Any) -> Array:
    """w_h·Σ_p|q⃗_ip − k⃗_jp|², (*B, H, N, N), or what stands for it."""
    low, of_head = partial(_low, formula, "distances"), weight.reshape((config.num_head, 1, 1, -1))
    if to := formula.rounded.get("expanded"):  # |q|² + |k|² − 2 q·k in another format
        q, k = round_to(to, q_points), round_to(to, k_points)
        q2, k2 = (round_to(to, xp.einsum("...nhpx,...nhpx->...hn", x, x)) for x in (q, k))
        cross = round_to(to, xp.einsum("...ihpx,...jhpx->...hij", q, k))
        return of_head[..., 0] * round_to(to, q2[..., :, None] + k2[..., None, :] - 2 * cross)
    q, k = low(q_points).swapaxes(-3, -4), low(k_points).swapaxes(-3, -4)  # (*B, H, N, P, 3)
    offset = low(q[..., :, None, :, :] - k[..., None, :, :, :])
    squares = (offset * offset).sum(-1)
    form = formula.distance if formula.distance != "right" else config.distance_form
    epsilon = {"right": config.distance_epsilon, "unsquared": 1e-8}.get(formula.distance, 0.0)
    if form == "unsquared over points":
        return of_head[..., 0] * xp.sqrt(squares.sum(-1) + epsilon)
    return (of_head * (squares if form == "squared" else xp.sqrt(squares + epsilon))).sum(-1)


def _w_c(formula: Formula, config: IPAConfig) -> float:
    """√(2/(9P)) or what stands for it."""
    points = config.num_point_qk
    return {
        "right": math.sqrt(2 / (9 * points)),
        "missing": 1.0,
        "value points": math.sqrt(2 / (9 * config.num_point_v)),
        "both points": math.sqrt(2 / (9 * (points + config.num_point_v))),
        "without root": 2 / (9 * points),
        "without P": math.sqrt(2 / 9),
        "all heads": math.sqrt(2 / (9 * points * config.num_head)),
        "inverted": math.sqrt(9 * points / 2),
        "without 9": math.sqrt(2 / points),
        "1/9P": math.sqrt(1 / (9 * points)),
    }[formula.w_c]


def _head_weights(formula: Formula, config: IPAConfig, gamma: Array, xp: Any) -> Array:
    form = formula.gamma if formula.gamma != "right" else config.point_weight_form

    def softplus(x: Array) -> Array:
        return xp.log1p(xp.exp(x))

    return {
        "softplus": softplus,
        "identity": lambda x: x,
        "exp": xp.exp,
        "relu": lambda x: xp.where(x > 0, x, 0 * x),
        "sigmoid": lambda x: 1 / (1 + xp.exp(-x)),
        "power": lambda x: softplus(x) ** config.num_head,
        "softplus twice": lambda x: softplus(softplus(x)),
        "softmax": lambda x: xp.exp(x) / xp.exp(x).sum(),
        "constant": lambda x: 1 + 0 * x,
    }[form](gamma)


def _attention(formula: Formula, logits: Array, mask: Array, backend: Backend) -> Array:
    """The softmax of line 7, with the mask."""
    xp = backend.xp
    i, j = mask[..., None, :, None], mask[..., None, None, :]
    hidden = {
        "right": i * (1 - j) if formula.masked_rows == "all keys" else (1 - j) + 0 * i,
        "inverted": j + 0 * i,
        "ignored": 0 * i * j,
        "queries": (1 - i) + 0 * j,
        "both": (1 - i) * (1 - j),
        "unless both hidden": i * (1 - j) + j * (1 - i),
    }
    shown = 1 - hidden["right"]
    if formula.mask == "swamped":
        logits = 0 * logits - 1e5 * hidden["right"]
    elif formula.mask == "multiplied":
        logits = logits * shown
    elif formula.mask == "too weak":
        logits = logits - hidden["right"]
    elif formula.mask in hidden:
        logits = logits - 1e5 * hidden[formula.mask]
    axis = {"keys": -1, "queries": -2, "heads": -3}[formula.softmax]
    weights = xp.exp(logits - backend.stop(xp.amax(logits, axis=axis, keepdims=True)))
    attention = weights / weights.sum(axis=axis, keepdims=True)
    return attention * shown if formula.mask == "after softmax" else attention


def _norms(formula: Formula, config: IPAConfig, x: Array, xp: Any) -> Array:
    """Lengths of points (*B, N, H, P, 3) (line 11)."""
    squares = (x * x).sum(axis=-1)
    epsilon = config.norm_epsilon if formula.epsilon is None else formula.epsilon
    if formula.norm == "zero":
        return 0 * squares
    if formula.norm == "squared":
        return squares
    if formula.norm == "capped":
        return xp.sqrt(xp.where(squares > epsilon**2, 0 * squares + epsilon**2, squares))
    if (formula.norm if formula.norm in ("add", "clamp") else config.norm_form) == "add":
        return xp.sqrt(squares + epsilon)
    return xp.sqrt(xp.where(squares < epsilon**2, 0 * squares + epsilon**2, squares))


def _pair_values(
    formula: Formula, parameters: Mapping[str, Array], config: IPAConfig, weights: Array, pair: Array, xp: Any
) -> Array:
    """The sum over the pair (line 8), projected where the config says so."""
    axes = "jic" if formula.pair_values == "transposed" else "ijc"
    if formula.pair_values == "column sums":
        weights = weights.sum(axis=-2, keepdims=True) + 0 * weights
    o_pair = xp.einsum(f"...hij,...{axes}->...ihc", weights, _low(formula, "values", pair))
    if config.pair_value_per_head:
        by_head = parameters["pair_value/weights"].reshape((-1, config.num_head, config.pair_value_channel))
        return xp.einsum("...hc,chd->...hd", o_pair, by_head)
    if config.pair_value_channel is not None:
        o_pair = o_pair @ parameters["down_z/weights"] + parameters["down_z/bias"]
    return 0 * o_pair if formula.pair_values == "zero" else o_pair


def _output(
    formula: Formula, parameters: Mapping[str, Array], stages: Mapping[str, Array], single: Array, xp: Any
) -> Array:
    """The projection of all features (line 11)."""
    points = stages["points"]
    parts = {**stages, "x": points[..., 0], "y": points[..., 1], "z": points[..., 2]}
    features = []
    for name in formula.order:
        part = parts.get(name)
        if part is not None:
            part = part.swapaxes(-1, single.ndim - 1) if formula.feature_heads == "inner" else part
            features.append(part.reshape((*single.shape[:-1], -1)))
    weights = parameters["output_projection/weights"]
    out = _product(formula, "output", xp.concatenate(features, -1), weights)
    if formula.output != "without bias":
        out = out + parameters["output_projection/bias"]
    return out + single if formula.output == "with the input" else out
