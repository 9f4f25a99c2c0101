"""Modules around an attention, computed with the parameters and names of any system."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy import ndarray

from ipa_bridge.config import IPABlockConfig, IPATransformerConfig, StructureModuleConfig
from ipa_bridge.weights.semantics.system import Parameters, System


def structure_module(
    system: System, p: Parameters, c: StructureModuleConfig, single: ndarray, pair: ndarray, mask: ndarray
) -> dict[str, ndarray]:
    """Suppl. Alg. 20 up to the angles: act, rotation, translation (Å) and unnormalized_angles, layers first."""
    linear, norm = system.layers(p)
    n = len(single)
    initial, edges = single, pair
    if c.input_norm:
        initial, edges = norm(system.name("single_layer_norm"), single), norm(system.name("pair_layer_norm"), pair)
    if c.pair_input_channel is not None:
        edges = linear(system.name("pair_projection"), edges)
    act = linear(system.name("initial_projection"), initial)
    if c.project_initial_act:
        initial = act
    rotation, translation = np.broadcast_to(np.eye(3), (n, 3, 3)), np.zeros((n, 3))
    layers = []
    for layer in range(c.num_layer):
        fold = system.fold(0 if c.tied_layers else layer)
        within = system.below(p, system.name("invariant_point_attention/", within=fold))
        pair = edges
        if c.distance_channel:
            apart = np.linalg.norm(translation[:, None] - translation, axis=-1) * np.outer(mask, mask)
            pair = np.concatenate([edges, apart[..., None]], -1)
        act = act + system.attention(within, c.ipa, act, pair, rotation, translation, mask)
        act = norm(system.name("attention_layer_norm", within=fold), act)
        x = act
        for i in range(c.num_layer_in_transition):
            x = x if i == 0 else np.maximum(x, 0)
            x = linear(system.name("transition", i, fold), x)
        act = norm(system.name("transition_layer_norm", within=fold), act + x)
        if c.skip_connection and layer + 1 < c.num_layer:
            act = act + initial
        update = "affine_update" if c.ipa.layout == "monomer" else "quat_rigid/rigid"
        step = linear(system.name(update, within=fold), act)
        translation = translation + np.einsum("nxy,ny->nx", rotation, step[:, 3:])
        rotation = rotation @ _quaternion_to_rotation(step[:, :3])
        angles = _angles(system, linear, c, fold, act, initial)
        layers.append((act, rotation, c.position_scale * translation, angles.reshape(n, 7, 2)))
    fields = ("act", "rotation", "translation", "unnormalized_angles")
    return {field: np.stack(x) for field, x in zip(fields, zip(*layers, strict=True), strict=True)}


def _angles(
    system: System,
    linear: Callable[[str, ndarray], ndarray],
    c: StructureModuleConfig,
    fold: str,
    act: ndarray,
    initial: ndarray,
) -> ndarray:
    """The seven unnormalised (sin, cos) pairs per residue, flat."""

    def inside(module: str, number: int = 0) -> str:
        return system.name(f"rigid_sidechain/{module}", number, fold)

    if c.sidechain_input == "summed":
        x = linear(inside("input_projection"), np.maximum(act, 0))
        x = x + linear(inside("input_projection_1"), np.maximum(initial, 0))
    else:
        x = np.concatenate([act, initial], -1)
    for i in range(c.num_residual_block):
        y = x
        for k in (0, 1, 2) if c.num_layer_in_residual_block == 3 else (1, 2):
            y = linear(inside(f"resblock{k}", i), np.maximum(y, 0))
        x = x + y
    return linear(inside("unnormalized_angles"), np.maximum(x, 0))


def block(
    system: System,
    p: Parameters,
    c: IPABlockConfig,
    act: ndarray,
    pair: ndarray | None,
    rotation: ndarray,
    translation: ndarray,
    mask: ndarray,
) -> ndarray:
    """`IPABlock`'s output, with layer norms after (`post_norm`) or before attention and transition."""
    linear, norm = system.layers(p)
    within = system.below(p, system.name("invariant_point_attention/"))

    def attend(x: ndarray) -> ndarray:
        return system.attention(within, c.ipa, x, pair, rotation, translation, mask)

    def feed_forward(x: ndarray) -> ndarray:
        for i in range(c.num_layer_in_transition):
            x = linear(system.name("transition", i), x if i == 0 else np.maximum(x, 0))
        return x

    for function, name in ((attend, "attention_layer_norm"), (feed_forward, "transition_layer_norm")):
        name = system.name(name)
        act = norm(name, act + function(act)) if c.post_norm else act + function(norm(name, act))
    return act


def transformer(
    system: System,
    p: Parameters,
    c: IPATransformerConfig,
    single: ndarray,
    pair: ndarray | None,
    rotation: ndarray,
    translation: ndarray,
    mask: ndarray,
) -> tuple[ndarray, ndarray, ndarray, ndarray | None]:
    """`IPATransformer`'s activations, rotations, translations and points.

    The mask is applied here; the package's own transformer ignores it.
    """
    linear, _ = system.layers(p)
    act = single
    if c.num_token is not None:
        act = p[system.name("token_embedding/embeddings")][single]
    for layer in range(c.num_layer):
        within = system.below(p, system.name("ipa_block", layer) + "/")
        act = block(system, within, c.block, act, pair, rotation, translation, mask)
        step = linear(system.name("affine_update", layer), act)
        translation = translation + np.einsum("nxy,ny->nx", rotation, step[:, 3:])
        turn = _quaternion_to_rotation(step[:, :3])
        # The package's rotations are the transpose of ours (row vectors), but it multiplies them in our order.
        rotation = np.swapaxes(turn, -1, -2) @ rotation if c.original_composition_order else rotation @ turn
    points = None
    if c.predict_points:
        local = linear(system.name("predicted_points"), act)
        points = np.einsum("nxy,ny->nx", rotation, local) + translation
    return act, rotation, translation, points


def confidence(system: System, p: Parameters, act: ndarray) -> ndarray:
    """Suppl. Alg. 29: logits."""
    linear, norm = system.layers(p)
    x = norm(system.name("input_layer_norm"), act)
    for name in ("act_0", "act_1"):
        x = np.maximum(linear(system.name(name), x), 0)
    return linear(system.name("logits"), x)


def _quaternion_to_rotation(bcd: ndarray) -> ndarray:
    """The rotation of the quaternion (1, b, c, d), normalised."""
    b, c, d = (bcd / np.sqrt(1 + (bcd**2).sum(-1, keepdims=True))).T
    a = 1 / np.sqrt(1 + (bcd**2).sum(-1))
    rows = [
        [1 - 2 * (c * c + d * d), 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), 1 - 2 * (b * b + d * d), 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), 1 - 2 * (b * b + c * c)],
    ]
    return np.moveaxis(np.array(rows), -1, 0)
