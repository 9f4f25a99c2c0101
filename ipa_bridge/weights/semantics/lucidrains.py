"""The computation of the PyPI package `invariant-point-attention`."""

from __future__ import annotations

import numpy as np
from numpy import ndarray

from ipa_bridge import oracle
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
    """The attention of `invariant-point-attention`: points (h, p, c) in all projections."""
    n, h = len(single), c.num_head
    q, k, v = (torch_linear(p, f"to_scalar_{x}", single).reshape(n, h, -1) for x in "qkv")
    points = [torch_linear(p, f"to_point_{x}", single).reshape(n, h, -1, 3) for x in "qkv"]
    bias = None if pair is None else np.moveaxis(torch_linear(p, "to_pairwise_attn_bias.0", pair), -1, 0)
    _, _, o, o_points, norms, o_pair, _ = oracle.attend(
        c, (q, k, v, *points), pair, bias, p["point_weights"], rotation, translation / c.position_scale, mask
    )
    parts = [o, o_points, norms, *([] if o_pair is None else [o_pair])]
    return torch_linear(p, "to_out", np.concatenate([x.reshape(n, -1) for x in parts], -1))


LUCIDRAINS = System(
    attention,
    {
        "invariant_point_attention/": "attn.",
        "attention_layer_norm": "attn_norm",
        "transition": "ff.{2}",
        "transition_layer_norm": "ff_norm",
        "token_embedding/embeddings": "token_emb.weight",
        "ipa_block": "layers.{0}.0",
        "affine_update": "layers.{0}.1",
        "predicted_points": "to_points",
    },
)
