"""The computation of OmegaFold."""

from __future__ import annotations

from typing import cast

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
    """The attention of OmegaFold: points (h, p, c) in all projections, lengths without an ε, a mask of keys."""
    n, h = len(single), c.num_head
    scalars = [torch_linear(p, f"{x}_scalar", single).reshape(n, h, -1) for x in "qkv"]
    points = [torch_linear(p, f"{x}_point", single).reshape(n, h, -1, 3) for x in "qkv"]
    bias = np.moveaxis(torch_linear(p, "bias_2d", cast(ndarray, pair)), -1, 0)
    frames = (rotation, translation / c.position_scale)
    stages = oracle.attend(
        c, (*scalars, *points), pair, bias, p["trainable_point_weights"], *frames, key_mask=mask.astype(bool)
    )
    lengths = np.sqrt((stages.o_points**2).sum(-1))
    parts = [stages.o, stages.o_points, lengths, cast(ndarray, stages.o_pair)]
    return torch_linear(p, "output_projection", np.concatenate([x.reshape(n, -1) for x in parts], -1))


OMEGAFOLD = System(attention)
