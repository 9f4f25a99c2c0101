"""What every system computes with its own parameters under its own names: float64 numpy, small inputs.

Written from each system's conventions and not from our tables of its names, so that a conversion can be probed: the
source's parameters in its semantics, and the target's in its own, must be the same function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
from numpy import ndarray

from ipa_bridge import oracle
from ipa_bridge.config import (
    Config,
    IPABlockConfig,
    IPAConfig,
    IPATransformerConfig,
    PredictedLDDTConfig,
    StructureModuleConfig,
    attention_of,
)
from ipa_bridge.proteins.frames import random_frames

Parameters = Mapping[str, ndarray]

RESIDUES = 9
"""Of a probe."""


def probe(dialect: str, parameters: Parameters, config: Config, *, seed: int = 0) -> ndarray:
    """Outputs on random inputs, the same ones for every dialect.

    Args:
        dialect: whose semantics.
        parameters: under its names, below the module.
        config: what its modules are told.
        seed: of the inputs.
    """
    p = {name: np.asarray(x, np.float64) for name, x in parameters.items()}
    rng = np.random.default_rng(seed)
    if isinstance(config, PredictedLDDTConfig):
        return _confidence(dialect, p, rng.standard_normal((RESIDUES, config.num_channel)))
    ipa = attention_of(config)
    single: ndarray = rng.standard_normal((RESIDUES, ipa.num_channel))
    pair = None if ipa.pair_channel is None else rng.standard_normal((RESIDUES, RESIDUES, ipa.pair_channel))
    rotation, translation = random_frames(rng, (RESIDUES,), spread=2.0)
    mask = np.arange(RESIDUES) != RESIDUES // 2
    if isinstance(config, StructureModuleConfig):
        layers = structure_module(dialect, p, config, single, cast(ndarray, pair), mask)
        return np.concatenate([x[:, mask].ravel() for x in layers.values()])
    inputs = (pair, rotation, translation * ipa.position_scale, mask)
    if isinstance(config, IPATransformerConfig):
        tokens = rng.integers(0, config.num_token or 1, RESIDUES)
        outputs = transformer(dialect, p, config, single if config.num_token is None else tokens, *inputs)
        return np.concatenate([x[mask].ravel() for x in outputs if x is not None])
    if isinstance(config, IPABlockConfig):
        return block(dialect, p, config, single, *inputs)[mask]
    return attention(dialect, p, config, single, *inputs)[mask]


def attention(
    dialect: str,
    p: Parameters,
    config: IPAConfig,
    single: ndarray,
    pair: ndarray | None,
    rotation: ndarray,
    translation: ndarray,
    mask: ndarray,
) -> ndarray:
    """One invariant point attention's output; frames are ours, and turned or scaled as the system's callers must."""
    arguments = (p, config, single, pair, rotation, translation / config.position_scale, mask)
    if dialect == "lucidrains":
        return _lucidrains(*arguments)
    if dialect in ("alphafold", "ipa_jax"):
        return oracle.invariant_point_attention(p, config, single, pair, rotation, translation, mask).out
    if dialect == "ipa_torch":
        return oracle.invariant_point_attention(
            _of_torch(p, config), config, single, pair, rotation, translation, mask
        ).out
    return _openfold(*arguments, points=".linear" if dialect == "openfold" else "")


def _linear(p: Parameters, name: str, x: ndarray) -> ndarray:
    """torch's: weight (out, in), and a bias if there is one."""
    output = x @ p[f"{name}.weight"].T
    return output + p[f"{name}.bias"] if f"{name}.bias" in p else output


def _openfold(
    p: Parameters,
    c: IPAConfig,
    single: ndarray,
    pair: ndarray | None,
    rotation: ndarray,
    translation: ndarray,
    mask: ndarray,
    *,
    points: str,
) -> ndarray:
    """OpenFold's, ESMFold's and FrameDiff's, which projects the pair down before it is attended to."""
    n, h, qk, p_qk = len(single), c.num_head, c.num_scalar_qk, c.num_point_qk
    if "linear_kv.weight" in p:
        q = _linear(p, "linear_q", single).reshape(n, h, qk)
        k, v = np.split(_linear(p, "linear_kv", single).reshape(n, h, -1), [qk], -1)
        q_points, kv_points = (
            np.stack(np.split(_linear(p, f"linear_{x}_points{points}", single), 3, -1), -1).reshape(n, h, -1, 3)
            for x in ("q", "kv")
        )
        k_points, v_points = np.split(kv_points, [p_qk], -2)
    else:
        q, k, v = (_linear(p, f"linear_{x}", single).reshape(n, h, -1) for x in "qkv")
        q_points, k_points, v_points = (
            np.swapaxes(_linear(p, f"linear_{x}_points{points}", single).reshape(n, h, 3, -1), -1, -2) for x in "qkv"
        )
    pair = cast(ndarray, pair)
    bias = np.moveaxis(_linear(p, "linear_b", pair), -1, 0)
    values = _linear(p, "down_z", pair) if "down_z.weight" in p else pair
    projections = (q, k, v, q_points, k_points, v_points)
    _, _, o, o_points, norms, o_pair, _ = oracle.attend(
        c, projections, values, bias, p["head_weights"], rotation, translation, mask
    )
    parts = [o, *np.moveaxis(o_points, -1, 0), norms, cast(ndarray, o_pair)]
    return _linear(p, "linear_out", np.concatenate([x.reshape(n, -1) for x in parts], -1))


def _lucidrains(
    p: Parameters,
    c: IPAConfig,
    single: ndarray,
    pair: ndarray | None,
    rotation: ndarray,
    translation: ndarray,
    mask: ndarray,
) -> ndarray:
    """`invariant-point-attention`'s: points (h, p, c) within the projections and within what the last one reads."""
    n, h = len(single), c.num_head
    q, k, v = (_linear(p, f"to_scalar_{x}", single).reshape(n, h, -1) for x in "qkv")
    points = [_linear(p, f"to_point_{x}", single).reshape(n, h, -1, 3) for x in "qkv"]
    bias = None if pair is None else np.moveaxis(_linear(p, "to_pairwise_attn_bias.0", pair), -1, 0)
    _, _, o, o_points, norms, o_pair, _ = oracle.attend(
        c, (q, k, v, *points), pair, bias, p["point_weights"], rotation, translation, mask
    )
    parts = [o, o_points, norms, *([] if o_pair is None else [o_pair])]
    return _linear(p, "to_out", np.concatenate([x.reshape(n, -1) for x in parts], -1))


def _of_torch(p: Parameters, config: IPAConfig) -> dict[str, ndarray]:
    """Our torch parameters as the oracle takes them."""
    canonical = {}
    for name, x in p.items():
        module, _, leaf = name.replace(".", "/").rpartition("/")
        multimer = config.layout == "multimer" and module.endswith(("_scalar_projection", "point_projection"))
        x = x.T if leaf == "weight" else x
        canonical[f"{module}/{leaf}s" if leaf == "weight" else f"{module}/{leaf}" if module else leaf] = (
            x.reshape(*x.shape[:-1], config.num_head, -1) if multimer else x
        )
    return canonical


def structure_module(
    dialect: str, p: Parameters, c: StructureModuleConfig, single: ndarray, pair: ndarray, mask: ndarray
) -> dict[str, ndarray]:
    """Suppl. Alg. 20 up to the angles: act, rotation, translation (Å) and unnormalized_angles, layers first."""
    openfold = dialect not in ("alphafold", "ipa_jax", "ipa_torch")
    linear, norm = _layers(dialect, p)
    n = len(single)
    initial = norm("layer_norm_s" if openfold else "single_layer_norm", single)
    pair = norm("layer_norm_z" if openfold else "pair_layer_norm", pair)
    act = linear("linear_in" if openfold else "initial_projection", initial)
    rotation, translation = np.broadcast_to(np.eye(3), (n, 3, 3)), np.zeros((n, 3))
    layers = []
    for layer in range(c.num_layer):
        fold = f"fold_iteration_{layer}" if layer and not c.tied_layers else "fold_iteration"
        prefix = "ipa." if openfold else f"{fold}{'.' if dialect == 'ipa_torch' else '/'}invariant_point_attention"
        prefix += "" if openfold else prefix[len(fold)]
        within = {name.removeprefix(prefix): x for name, x in p.items() if name.startswith(prefix)}
        act = act + attention(dialect, within, c.ipa, act, pair, rotation, translation, mask)
        act = norm("layer_norm_ipa" if openfold else f"{fold}/attention_layer_norm", act)
        x = act
        for i in range(c.num_layer_in_transition):
            x = x if i == 0 else np.maximum(x, 0)
            name = f"transition.layers.0.linear_{i + 1}" if openfold else f"{fold}/transition" + (f"_{i}" if i else "")
            x = linear(name, x)
        act = norm("transition.layer_norm" if openfold else f"{fold}/transition_layer_norm", act + x)
        update = "affine_update" if c.ipa.layout == "monomer" else "quat_rigid/rigid"
        step = linear("bb_update.linear" if openfold else f"{fold}/{update}", act)
        translation = translation + np.einsum("nxy,ny->nx", rotation, step[:, 3:])
        rotation = rotation @ _quaternion_to_rotation(step[:, :3])
        angles = _angles(linear, c, f"{fold}/rigid_sidechain/" if not openfold else "", act, initial)
        layers.append((act, rotation, c.position_scale * translation, angles.reshape(n, 7, 2)))
    fields = ("act", "rotation", "translation", "unnormalized_angles")
    return {field: np.stack(x) for field, x in zip(fields, zip(*layers, strict=True), strict=True)}


def block(
    dialect: str,
    p: Parameters,
    c: IPABlockConfig,
    act: ndarray,
    pair: ndarray | None,
    rotation: ndarray,
    translation: ndarray,
    mask: ndarray,
) -> ndarray:
    """`IPABlock`'s, after or before its layer norms."""
    linear, norm = _layers(dialect, p)
    theirs = dialect == "lucidrains"
    norms = ("attn_norm", "ff_norm") if theirs else ("attention_layer_norm", "transition_layer_norm")
    prefix = "attn." if theirs else f"invariant_point_attention{'.' if dialect == 'ipa_torch' else '/'}"
    within = {name.removeprefix(prefix): x for name, x in p.items() if name.startswith(prefix)}

    def attend(x: ndarray) -> ndarray:
        return attention(dialect, within, c.ipa, x, pair, rotation, translation, mask)

    def feed_forward(x: ndarray) -> ndarray:
        for i in range(c.num_layer_in_transition):
            name = f"ff.{2 * i}" if theirs else "transition" + (f"_{i}" if i else "")
            x = linear(name, x if i == 0 else np.maximum(x, 0))
        return x

    for function, name in zip((attend, feed_forward), norms, strict=True):
        act = norm(name, act + function(act)) if c.post_norm else act + function(norm(name, act))
    return act


def transformer(
    dialect: str,
    p: Parameters,
    c: IPATransformerConfig,
    single: ndarray,
    pair: ndarray | None,
    rotation: ndarray,
    translation: ndarray,
    mask: ndarray,
) -> tuple[ndarray, ndarray, ndarray, ndarray | None]:
    """`IPATransformer`'s activations, rotations, translations and points; its mask is honoured, which it never was."""
    theirs, dot = dialect == "lucidrains", "/" if dialect in ("alphafold", "ipa_jax") else "."
    linear, _ = _layers(dialect, p)
    act = single
    if c.num_token is not None:
        embedding = "token_emb.weight" if theirs else "token_embedding/embeddings"
        act = p[embedding if dot == "/" or theirs else "token_embedding.weight"][single]
    for layer in range(c.num_layer):
        number = f"_{layer}" if layer else ""
        prefix = f"layers.{layer}.0." if theirs else f"ipa_block{number}{dot}"
        within = {name.removeprefix(prefix): x for name, x in p.items() if name.startswith(prefix)}
        act = block(dialect, within, c.block, act, pair, rotation, translation, mask)
        step = linear(f"layers.{layer}.1" if theirs else f"affine_update{number}", act)
        translation = translation + np.einsum("nxy,ny->nx", rotation, step[:, 3:])
        turn = _quaternion_to_rotation(step[:, :3])
        # Theirs are rows: its rotations are the transpose of ours, and it multiplies them in the same order.
        rotation = np.swapaxes(turn, -1, -2) @ rotation if c.original_composition_order else rotation @ turn
    points = None
    if c.predict_points:
        local = linear("to_points" if theirs else "predicted_points", act)
        points = np.einsum("nxy,ny->nx", rotation, local) + translation
    return act, rotation, translation, points


def _angles(linear: Callable, c: StructureModuleConfig, prefix: str, act: ndarray, initial: ndarray) -> ndarray:
    """Seven unnormalised (sin, cos)."""
    if prefix:
        current, first, last = "input_projection", "input_projection_1", "unnormalized_angles"
        blocks = [[f"resblock{k}" + (f"_{i}" if i else "") for k in (1, 2)] for i in range(c.num_residual_block)]
    else:
        current, first, last = (f"angle_resnet.{x}" for x in ("linear_in", "linear_initial", "linear_out"))
        blocks = [[f"angle_resnet.layers.{i}.linear_{k}" for k in (1, 2)] for i in range(c.num_residual_block)]
    x = linear(prefix + current, np.maximum(act, 0)) + linear(prefix + first, np.maximum(initial, 0))
    for one, two in blocks:
        x = x + linear(prefix + two, np.maximum(linear(prefix + one, np.maximum(x, 0)), 0))
    return linear(prefix + last, np.maximum(x, 0))


def _confidence(dialect: str, p: Parameters, act: ndarray) -> ndarray:
    """Suppl. Alg. 29: logits."""
    linear, norm = _layers(dialect, p)
    ours = dialect in ("alphafold", "ipa_jax", "ipa_torch")
    names = (
        ("input_layer_norm", "act_0", "act_1", "logits") if ours else ("layer_norm", *(f"linear_{i}" for i in "123"))
    )
    x = norm(names[0], act)
    for name in names[1:3]:
        x = np.maximum(linear(name, x), 0)
    return linear(names[3], x)


def _layers(dialect: str, p: Parameters) -> tuple[Callable[[str, ndarray], ndarray], Callable[[str, ndarray], ndarray]]:
    """Linear layers and layer norms (ε 1e-5) by name, in haiku's parameters or in torch's."""
    haiku = dialect in ("alphafold", "ipa_jax")

    def linear(name: str, x: ndarray) -> ndarray:
        if haiku:
            return x @ p[f"{name}/weights"] + p[f"{name}/bias"]
        return _linear(p, name.replace("/", "."), x)

    def norm(name: str, x: ndarray) -> ndarray:
        scale, offset = (f"{name}/scale", f"{name}/offset") if haiku else (f"{name}/weight", f"{name}/bias")
        if not haiku:
            scale, offset = scale.replace("/", "."), offset.replace("/", ".")
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p[scale] + p[offset]

    return linear, norm


def _quaternion_to_rotation(bcd: ndarray) -> ndarray:
    """Of (1, b, c, d), normalised."""
    b, c, d = (bcd / np.sqrt(1 + (bcd**2).sum(-1, keepdims=True))).T
    a = 1 / np.sqrt(1 + (bcd**2).sum(-1))
    rows = [
        [1 - 2 * (c * c + d * d), 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), 1 - 2 * (b * b + d * d), 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), 1 - 2 * (b * b + c * c)],
    ]
    return np.moveaxis(np.array(rows), -1, 0)


def distance(one: ndarray, other: ndarray) -> float:
    """Largest difference over the largest value; infinite where that is zero, for zeros tell nothing."""
    largest = float(np.abs(other).max())
    return float(np.abs(one - other).max()) / largest if largest else math.inf
