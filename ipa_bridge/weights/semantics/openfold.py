"""The computation of OpenFold, which is also that of ESMFold, FrameDiff, FrameFlow, MDGen and Uni-Fold."""

from __future__ import annotations

from functools import partial

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
    *,
    points: str,
) -> ndarray:
    """The attention of OpenFold, ESMFold and FrameDiff; FrameDiff projects the attended pair down (`down_z`).

    Args:
        p: the attention's parameters.
        c: the attention's config.
        single: (N, c_s).
        pair: (N, N, c_z); None for MDGen's attention without one, whose config has logit_terms=3.
        rotation: (N, 3, 3).
        translation: (N, 3), in the caller's unit.
        mask: (N,).
        points: suffix of the names of the point projections.
    """
    n, h, qk, p_qk = len(single), c.num_head, c.num_scalar_qk, c.num_point_qk
    if "linear_kv.weight" in p:
        q = torch_linear(p, "linear_q", single).reshape(n, h, qk)
        k, v = np.split(torch_linear(p, "linear_kv", single).reshape(n, h, -1), [qk], -1)
        q_points, kv_points = (
            np.stack(np.split(torch_linear(p, f"linear_{x}_points{points}", single), 3, -1), -1).reshape(n, h, -1, 3)
            for x in ("q", "kv")
        )
        k_points, v_points = np.split(kv_points, [p_qk], -2)
    else:
        q, k, v = (torch_linear(p, f"linear_{x}", single).reshape(n, h, -1) for x in "qkv")
        q_points, k_points, v_points = (
            np.swapaxes(torch_linear(p, f"linear_{x}_points{points}", single).reshape(n, h, 3, -1), -1, -2)
            for x in "qkv"
        )
    if pair is None:  # as in MDGen
        bias = values = None
    else:
        bias = np.moveaxis(torch_linear(p, "linear_b", pair), -1, 0)
        values = torch_linear(p, "down_z", pair) if "down_z.weight" in p else pair
    projections = (q, k, v, q_points, k_points, v_points)
    _, _, o, o_points, norms, o_pair, _ = oracle.attend(
        c, projections, values, bias, p["head_weights"], rotation, translation / c.position_scale, mask
    )
    parts = [o, *np.moveaxis(o_points, -1, 0), norms, *([] if o_pair is None else [o_pair])]
    return torch_linear(p, "linear_out", np.concatenate([x.reshape(n, -1) for x in parts], -1))


NAMES = {
    "single_layer_norm": "layer_norm_s",
    "pair_layer_norm": "layer_norm_z",
    "initial_projection": "linear_in",
    "invariant_point_attention/": "ipa.",
    "attention_layer_norm": "layer_norm_ipa",
    "transition": "transition.layers.0.linear_{1}",
    "transition_layer_norm": "transition.layer_norm",
    "affine_update": "bb_update.linear",
    "quat_rigid/rigid": "bb_update.linear",
    "rigid_sidechain/input_projection": "angle_resnet.linear_in",
    "rigid_sidechain/input_projection_1": "angle_resnet.linear_initial",
    "rigid_sidechain/resblock1": "angle_resnet.layers.{0}.linear_1",
    "rigid_sidechain/resblock2": "angle_resnet.layers.{0}.linear_2",
    "rigid_sidechain/unnormalized_angles": "angle_resnet.linear_out",
    "input_layer_norm": "layer_norm",
    "act_0": "linear_1",
    "act_1": "linear_2",
    "logits": "linear_3",
}

OPENFOLD = System(partial(attention, points=".linear"), NAMES, fold_iteration="")
OPENFOLD_V1 = System(partial(attention, points=""), NAMES, fold_iteration="")
