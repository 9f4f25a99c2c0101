"""Algorithms 22 and 24 (Jumper et al. 2021) in float64 numpy: the reference for tests of every implementation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from ipa_bridge.config import IPAConfig
from ipa_bridge.proteins import residues

einsum = partial(np.einsum, optimize=True)


class Stages(NamedTuple):
    """Every stage of Algorithm 22, in the order of its lines; None where there is no pair representation."""

    logits: ndarray  # (*B, H, N, N), masked keys of valid queries at −1e5
    attention: ndarray  # (*B, H, N, N)
    o: ndarray  # (*B, N, H, Cv)
    o_points: ndarray  # (*B, N, H, Pv, 3), in the local frame
    norms: ndarray  # (*B, N, H, Pv)
    o_pair: ndarray | None  # (*B, N, H, c_z), or projected down
    out: ndarray  # (*B, N, c_s)


def invariant_point_attention(
    parameters: Mapping[str, ndarray],
    config: IPAConfig,
    single: ndarray,
    pair: ndarray | None,
    rotation: ndarray,
    translation: ndarray,
    mask: ndarray | None = None,
    key_mask: ndarray | None = None,
    pair_mask: ndarray | None = None,
) -> Stages:
    """Computes all stages of one invariant point attention, with parameters by canonical name.

    Arithmetic is float64, or complex128 if an input is complex. The latter gives derivatives by the complex step: if
    the input has the imaginary part 1e-30·v, the outputs' imaginary parts are 1e-30 times the derivative along v,
    exact to rounding.
    """
    p = {name: _double(x) for name, x in parameters.items()}
    single = _double(single)
    bias = None
    if pair is not None:
        pair = _double(pair)
    if config.pair_channel is not None and config.pair_bias:
        bias = einsum("...ijc,ch->...hij", pair, p["attention_2d/weights"])  # line 4
        bias = bias + p.get("attention_2d/bias", np.zeros(config.num_head))[:, None, None]
    projections = _project(p, config, single)  # lines 1–3
    gamma, translation = p["trainable_point_weights"], translation / config.position_scale
    masks = (mask, key_mask, pair_mask)
    stages = attend(config, projections, pair, bias, gamma, rotation, translation, *masks)
    if config.pair_value_per_head:
        weights = p["pair_value/weights"].reshape(-1, config.num_head, config.pair_value_channel or 0)
        stages = stages._replace(o_pair=einsum("...hc,chd->...hd", stages.o_pair, weights))
    elif config.pair_value_channel is not None:
        stages = stages._replace(o_pair=stages.o_pair @ p["down_z/weights"] + p["down_z/bias"])
    _, _, o, o_points, norms, o_pair, _ = stages
    parts = [o, *np.moveaxis(o_points, -1, 0), norms, *([] if o_pair is None else [o_pair])]
    features = np.concatenate([x.reshape(*single.shape[:-1], math.prod(x.shape[single.ndim - 1 :])) for x in parts], -1)
    out = features @ p["output_projection/weights"] + p["output_projection/bias"]  # line 11
    return stages._replace(out=out)


def attend(
    config: IPAConfig,
    projections: Sequence[ndarray],
    pair: ndarray | None,
    bias: ndarray | None,
    gamma: ndarray,
    rotation: ndarray,
    translation: ndarray,
    mask: ndarray | None = None,
    key_mask: ndarray | None = None,
    pair_mask: ndarray | None = None,
) -> Stages:
    """Computes lines 5–10 from q, k, v (*B, N, H, C) and local points (*B, N, H, P, 3); `out` is left empty.

    Only the config's widths and forms are used. The pair may differ from the one that gave the bias (*B, H, N, N).
    Keys that key_mask (*B, N) or pair_mask (*B, N, N) hides, or the residue mask from a valid query beside them, have a
    weight of zero; a query without keys gets zeros.
    """
    q, k, v, *local_points = projections
    rotation, translation = _double(rotation), _double(translation)
    mask = np.ones(q.shape[:-2]) if mask is None else np.asarray(mask, np.float64)
    # A shift of all frames does not change the outputs, and near the origin float64 loses fewer bits.
    translation = translation - translation.real.sum(-2, keepdims=True) / max(translation.shape[-2], 1)
    q_points, k_points, v_points = (
        einsum("...nxy,...nhpy->...nhpx", rotation, x) + translation[..., None, None, :] for x in local_points
    )
    logits = einsum("...ihc,...jhc->...hij", q, k) / math.sqrt(config.num_scalar_qk)
    if bias is not None:
        logits = logits + bias
    w_c = math.sqrt(2 / (9 * config.num_point_qk))
    point_weights = np.log1p(np.exp(gamma)) if config.point_weight_form == "softplus" else gamma
    distance = np.stack([_distance(config, q_points, k_points, head) for head in range(config.num_head)], -3)
    logits = logits - 0.5 * w_c * point_weights[:, None, None] * distance
    logits = math.sqrt(1 / config.num_logit_terms) * logits
    masked = mask[..., :, None] * (1 - mask[..., None, :])
    logits = logits - 1e5 * masked[..., None, :, :]
    attention = _softmax(logits)  # line 7
    sees = np.ones(mask.shape)
    if key_mask is not None or pair_mask is not None:
        seen = masked == 0
        seen = seen if key_mask is None else seen & (key_mask[..., None, :] != 0)
        seen = seen if pair_mask is None else seen & (pair_mask != 0)
        sees = seen.any(-1)
        attention = _softmax(np.where((seen | ~sees[..., None])[..., None, :, :], logits, -np.inf))
        attention = attention * sees[..., None, :, None]

    o = einsum("...hij,...jhc->...ihc", attention, v)  # line 9
    o_pair = None if pair is None else einsum("...hij,...ijc->...ihc", attention, pair)  # line 8
    o_points = einsum("...hij,...jhpx->...ihpx", attention, v_points)  # line 10
    o_points = einsum("...nyx,...nhpy->...nhpx", rotation, o_points - translation[..., None, None, :])
    o_points = o_points * sees[..., None, None, None]
    length2 = einsum("...x,...x->...", o_points, o_points)
    epsilon = config.norm_epsilon
    if config.norm_form == "add":
        norms = np.sqrt(length2 + epsilon)
    else:
        norms = np.sqrt(np.where(length2.real < epsilon**2, epsilon**2, length2))
    return Stages(logits, attention, o, o_points, norms, o_pair, np.empty(0))


def _project(p: Mapping[str, ndarray], config: IPAConfig, single: ndarray) -> tuple[ndarray, ...]:
    """q, k, v as (*B, N, H, C) and local query, key and value points as (*B, N, H, P, 3)."""
    h = config.num_head

    def linear(name: str) -> ndarray:
        output = np.tensordot(single, p[f"{name}/weights"], 1)
        return output + p[f"{name}/bias"] if f"{name}/bias" in p else output

    batch = single.shape[:-1]
    if config.layout == "multimer":
        scalars = [linear(f"{letter}_scalar_projection") for letter in "qkv"]
        points = [linear(f"{letter}_point_projection/point_projection") for letter in "qkv"]
        points = [np.swapaxes(x.reshape(*batch, h, 3, x.shape[-1] // 3), -1, -2) for x in points]
        return _rotate(p, scalars[0]), _rotate(p, scalars[1]), scalars[2], *points
    qk, p_qk = config.num_scalar_qk, config.num_point_qk
    q = linear("q_scalar").reshape(*batch, h, qk)
    kv = linear("kv_scalar").reshape(*batch, h, qk + config.num_scalar_v)
    q_points = np.moveaxis(linear("q_point_local").reshape(*batch, 3, h, p_qk), -3, -1)
    kv_points = linear("kv_point_local").reshape(*batch, 3, h, p_qk + config.num_point_v)
    kv_points = np.moveaxis(kv_points, -3, -1)
    q, k = _rotate(p, q), _rotate(p, kv[..., :qk])
    return q, k, kv[..., qk:], q_points, kv_points[..., :p_qk, :], kv_points[..., p_qk:, :]


def _rotate(p: Mapping[str, ndarray], x: ndarray) -> ndarray:
    """The rotary embedding, if there is one: channels 2i and 2i + 1 turn by n · frequencies[i]."""
    if "rotary_frequencies" not in p:
        return x
    angle = np.arange(x.shape[-3])[:, None, None] * p["rotary_frequencies"]
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], np.cos(angle), np.sin(angle)
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)


def _distance(config: IPAConfig, q_points: ndarray, k_points: ndarray, head: int) -> ndarray:
    """Σ_p|q⃗_ip − k⃗_jp|² of one head, (*B, N, N), or the sum of lengths that are not squared.

    One head at a time, since the offsets of all heads would take far more memory.
    """
    offset = q_points[..., :, None, head, :, :] - k_points[..., None, :, head, :, :]
    if config.distance_form == "squared":
        return einsum("...ijpx,...ijpx->...ij", offset, offset)
    return np.sqrt(einsum("...x,...x->...", offset, offset) + config.distance_epsilon).sum(-1)


def _softmax(logits: ndarray) -> ndarray:
    if logits.shape[-1] == 0:
        return logits
    weights = np.exp(logits - logits.real.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _double(x: ndarray) -> ndarray:
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def rigid_groups(rotation: ndarray, translation: ndarray, angles: ndarray, aatype: ndarray) -> tuple[ndarray, ndarray]:
    """Rotations (*B, N, 8, 3, 3) and translations of every residue's rigid groups in float64 (Alg. 24, lines 1–10).

    Args:
        rotation: rotations of the backbone frames, (*B, N, 3, 3).
        translation: translations of the backbone frames, Å, (*B, N, 3).
        angles: unit (sin, cos) of pre-ω, φ, ψ, χ1–χ4, (*B, N, 7, 2).
        aatype: residue types 0–20, (*B, N).
    """
    parent = [0, 0, 0, 0, 0, 4, 5, 6]
    turns = np.zeros((*angles.shape[:-2], residues.NUM_GROUP, 3, 3))
    turns[..., 0, 0] = turns[..., 0, 1, 1] = turns[..., 0, 2, 2] = 1
    turns[..., 1:, 2, 1], turns[..., 1:, 1, 1] = np.moveaxis(_double(angles), -1, 0)
    turns[..., 1, 2], turns[..., 2, 2] = -turns[..., 2, 1], turns[..., 1, 1]
    local_rotation = residues.GROUP_ROTATION[aatype] @ turns
    local_translation = residues.GROUP_TRANSLATION[aatype]
    rotations, translations = [_double(rotation)], [_double(translation)]
    for group in range(1, residues.NUM_GROUP):
        frame, origin = rotations[parent[group]], translations[parent[group]]
        rotations.append(frame @ local_rotation[..., group, :, :])
        translations.append(einsum("...xy,...y->...x", frame, local_translation[..., group, :]) + origin)
    return np.stack(rotations, -3), np.stack(translations, -2)


def atom14(rotations: ndarray, translations: ndarray, aatype: ndarray) -> ndarray:
    """Atoms (*B, N, 14, 3) in Å from the rigid groups, in float64; absent atoms are zero (Alg. 24, line 11)."""
    group = residues.ATOM14_GROUP[aatype]
    rotation = np.take_along_axis(rotations, group[..., None, None], -3)
    origin = np.take_along_axis(translations, group[..., None], -2)
    atoms = einsum("...xy,...y->...x", rotation, residues.ATOM14_POSITIONS[aatype]) + origin
    return atoms * residues.ATOM14_MASK[aatype][..., None]
