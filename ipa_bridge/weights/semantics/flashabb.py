"""The computation of FlashABB."""

from __future__ import annotations

import math

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
    """FlashABB's attention; its spectrum of distances along the chain is the average of a pair, here any pair."""
    n, h = len(single), c.num_head
    translation = translation / c.position_scale
    q = torch_linear(p, "linear_q", single).reshape(n, h, -1)
    width = q.shape[-1]
    k, v = np.split(torch_linear(p, "linear_kv", single).reshape(n, h, -1), [width], -1)
    q, k = _turned(q, p["rotary_emb.freqs"]), _turned(k, p["rotary_emb.freqs"])
    points = torch_linear(p, "linear_points", single).reshape(n, 3, h, -1)
    points = np.einsum("nxy,nyhp->nhpx", rotation, points) + translation[:, None, None]
    q_points, k_points, v_points = np.split(points, [c.num_point_qk, 2 * c.num_point_qk], -2)
    distance2 = ((q_points[:, None] - k_points[None]) ** 2).sum((-1, -2))
    weight = np.log1p(np.exp(p["head_weights"])) * math.sqrt(1 / (3 * c.num_point_qk * 4.5))
    logits = np.einsum("ihd,jhd->ijh", q, k) / math.sqrt(3 * width) - 0.5 * weight * distance2
    logits = np.where(np.asarray(mask, bool)[None, :, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    weights = weights / weights.sum(1, keepdims=True)
    o = np.einsum("ijh,jhd->ihd", weights, v)
    o_points = np.einsum("ijh,jhpx->ihpx", weights, v_points) - translation[:, None, None]
    o_points = np.einsum("nyx,nhpy->nhpx", rotation, o_points)
    lengths = np.sqrt((o_points**2).sum(-1) + c.norm_epsilon)
    features = [o, *np.moveaxis(o_points, -1, 0), lengths]
    if pair is not None:
        features.append(np.einsum("ijh,ijz->ihz", weights, pair))
    return torch_linear(p, "linear_out", np.concatenate([x.reshape(n, -1) for x in features], -1))


def _turned(x: ndarray, frequencies: ndarray) -> ndarray:
    """Residue n's channels 2i and 2i + 1, as one complex number, multiplied by exp(i·n·frequency)."""
    turn = np.exp(1j * np.arange(len(x))[:, None] * frequencies)
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn[:, None]
    return np.stack([z.real, z.imag], -1).reshape(x.shape)


FLASHABB = System(attention)
