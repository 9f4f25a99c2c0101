"""The computation of ABodyBuilder2, NanoBodyBuilder2 and TCRBuilder2."""

from __future__ import annotations

import math
from typing import cast

import numpy as np
from numpy import ndarray

from ipa_bridge.config import IPAConfig
from ipa_bridge.weights.semantics.system import Parameters, System, torch_linear


def attention(
    p: Parameters,
    c: IPAConfig,
    single: ndarray,
    pair: ndarray | None,
    rotation: ndarray,
    translation: ndarray,
    mask: ndarray,
) -> ndarray:
    """The update that the class adds to its input. It takes no mask: masked residues are left out, and get zeros."""
    valid = np.asarray(mask, bool)
    out = np.zeros(single.shape)
    some = (single[valid], cast(ndarray, pair)[np.ix_(valid, valid)], rotation[valid], translation[valid])
    out[valid] = _update(p, c.num_head, *some, c.position_scale)
    return out


def _update(
    p: Parameters, heads: int, single: ndarray, pair: ndarray, rotation: ndarray, translation: ndarray, scale: float
) -> ndarray:
    n = len(single)
    q, k, v = (x.reshape(n, heads, -1) for x in np.split(torch_linear(p, "to_scalar_qkv", single), 3, -1))
    vectors = [*np.split(torch_linear(p, "to_vector_qk", single), 2, -1), torch_linear(p, "to_vector_v", single)]
    q_points, k_points, v_points = (
        np.einsum("nxy,nhpy->nhpx", rotation, x.reshape(n, heads, -1, 3)) + (translation / scale)[:, None, None]
        for x in vectors
    )
    offsets = q_points[:, None] - k_points[None]
    distance = np.sqrt((offsets**2).sum(-1) + 1e-8).sum(-1)
    weight = math.sqrt(2 / q_points.shape[-2]) / 6 * p["point_weight"]
    logits = np.einsum("ihd,jhd->ijh", q, k) / math.sqrt(q.shape[-1]) - weight * distance
    logits = (logits + torch_linear(p, "to_scalar_edge_attention_bias", pair)) / math.sqrt(3)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    weights = weights / weights.sum(1, keepdims=True)
    edges = np.einsum("ijh,ijz->ihz", weights, pair)
    scalars = np.einsum("ijh,jhd->ihd", weights, v)
    points = np.einsum("ijh,jhpx->ihpx", weights, v_points) - (translation / scale)[:, None, None]
    points = np.einsum("nyx,nhpy->nhpx", rotation, points)
    lengths = np.sqrt((points**2).sum(-1, keepdims=True) + 1e-8)
    features = [edges, scalars, np.concatenate([lengths, points], -1)]
    return torch_linear(p, "final_linear", np.concatenate([x.reshape(n, -1) for x in features], -1))


ABODYBUILDER2 = System(attention)
