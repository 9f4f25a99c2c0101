"""The computation of BioEmu and DiG."""

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
    """The attention of BioEmu and DiG: distances that are not squared, and values of the pair for each head."""
    n, h = len(single), c.num_head
    q, k, v = (torch_linear(p, f"scalar_{x}", single).reshape(n, h, -1) for x in ("query", "key", "value"))
    q_points, k_points, v_points = (
        np.einsum("nxy,nhpy->nhpx", rotation, torch_linear(p, f"point_{x}", single).reshape(n, h, -1, 3))
        + translation[:, None, None] / c.position_scale
        for x in ("query", "key", "value")
    )
    apart = np.sqrt(((q_points[:, None] - k_points[None]) ** 2).sum(-1)).sum(-1)  # query, key, head
    weights = np.log1p(np.exp(p["trained_point_weight"])) / math.sqrt(3 * q_points.shape[2] * 4.5)
    logits = np.einsum("ihc,jhc->ijh", q, k) / math.sqrt(3 * q.shape[-1]) - weights / 2 * apart
    pair = cast(ndarray, pair)
    logits = logits + torch_linear(p, "pair_bias", pair) / math.sqrt(3)
    logits = np.where(mask[None, :, None], logits, -np.inf)
    a = np.exp(logits - logits.max(1, keepdims=True))
    a = a / a.sum(1, keepdims=True)
    o = np.einsum("ijh,jhc->ihc", a, v)
    o_points = np.einsum("ijh,jhpx->ihpx", a, v_points) - translation[:, None, None] / c.position_scale
    o_points = np.einsum("nyx,nhpy->nhpx", rotation, o_points)
    o_pair = np.einsum("ijh,ijhc->ihc", a, torch_linear(p, "pair_value", pair).reshape(n, n, h, -1))
    parts = [o, o_points, o_pair, np.sqrt((o_points**2).sum(-1))]
    return torch_linear(p, "fc_out", np.concatenate([x.reshape(n, -1) for x in parts], -1))


BIOEMU = System(attention)
