"""OpenFold 1 and 2, which compute AlphaFold's attention; in version 2, point projections are modules of their own.

Multimer models have the multimer layout and exist only in version 2.
"""

from __future__ import annotations

import re

from ipa_bridge.config import IPAConfig, PredictedLDDTConfig, StructureModuleConfig
from ipa_bridge.weights.dialects.spec import Dialect, Form, Row, within

SHARED = (
    Row("trainable_point_weights", "head_weights"),
    Row("attention_2d", "linear_b"),
    Row("output_projection", "linear_out"),
)
MONOMER_V1 = (
    *SHARED,
    Row("q_scalar", "linear_q"),
    Row("kv_scalar", "linear_kv"),
    Row("q_point_local", "linear_q_points"),
    Row("kv_point_local", "linear_kv_points"),
)
MONOMER = (
    *MONOMER_V1[:-2],
    Row("q_point_local", "linear_q_points.linear"),
    Row("kv_point_local", "linear_kv_points.linear"),
)
MULTIMER = (
    *SHARED,
    *(Row(f"{x}_scalar_projection", f"linear_{x}") for x in "qkv"),
    *(Row(f"{x}_point_projection/point_projection", f"linear_{x}_points.linear") for x in "qkv"),
)
AROUND_ATTENTION = (
    Row("single_layer_norm", "layer_norm_s"),
    Row("pair_layer_norm", "layer_norm_z"),
    Row("initial_projection", "linear_in"),
    Row("fold_iteration/attention_layer_norm", "layer_norm_ipa"),
    Row("fold_iteration/transition{}", "transition.layers.0.linear_{1}"),
    Row("fold_iteration/transition_layer_norm", "transition.layer_norm"),
    Row("fold_iteration/rigid_sidechain/input_projection", "angle_resnet.linear_in"),
    Row("fold_iteration/rigid_sidechain/input_projection_1", "angle_resnet.linear_initial"),
    Row("fold_iteration/rigid_sidechain/resblock1{}", "angle_resnet.layers.{0}.linear_1"),
    Row("fold_iteration/rigid_sidechain/resblock2{}", "angle_resnet.layers.{0}.linear_2"),
    Row("fold_iteration/rigid_sidechain/unnormalized_angles", "angle_resnet.linear_out"),
)
CONFIDENCE = (
    Row("input_layer_norm", "layer_norm"),
    Row("act_0", "linear_1"),
    Row("act_1", "linear_2"),
    Row("logits", "linear_3"),
)
CONFIDENCE_LANDMARKS = ("layer_norm.weight", "linear_1.weight", "linear_2.weight", "linear_3.weight")


def structure_module(ipa: tuple[Row, ...], update: str) -> tuple[Row, ...]:
    """Rows of a structure module around its attention's; `update` is our layout's name of the backbone update."""
    attention = within("fold_iteration/invariant_point_attention/", "ipa.", ipa)
    return (*AROUND_ATTENTION, Row(f"fold_iteration/{update}", "bb_update.linear"), *attention)


def lies_in_esmfold(root: str) -> bool:
    """Returns True for a path that only ESMFold has; its names below the path are OpenFold 1's."""
    return re.search(r"(^|\.)trunk\.structure_module(\.|$)", root) is not None


def _anywhere(root: str, kind: type) -> bool:
    return kind is not PredictedLDDTConfig or root in ("", "plddt") or root.endswith(".plddt")


OPENFOLD = Dialect(
    name="openfold",
    title="OpenFold 2",
    rows={
        IPAConfig: {"monomer": MONOMER, "multimer": MULTIMER},
        StructureModuleConfig: {
            "monomer": structure_module(MONOMER, "affine_update"),
            "multimer": structure_module(MULTIMER, "quat_rigid/rigid"),
        },
        PredictedLDDTConfig: {"monomer": CONFIDENCE},
    },
    forms={
        "monomer": Form(scalar_bias=True, point_bias=True, norm_form="add", norm_epsilon=1e-8, one_width=True),
        "multimer": Form(scalar_bias=False, point_bias=True, norm_form="clamp", norm_epsilon=1e-8, one_width=True),
    },
    landmarks={
        StructureModuleConfig: ("layer_norm_s.weight", "ipa.head_weights", "ipa.linear_q_points.linear.weight"),
        IPAConfig: ("head_weights", "linear_q_points.linear.weight"),
        PredictedLDDTConfig: CONFIDENCE_LANDMARKS,
    },
    absent=("down_z.weight",),
    at=_anywhere,
    transitions=3,
)

OPENFOLD_V1 = Dialect(
    name="openfold_v1",
    title="OpenFold 1",
    rows={
        IPAConfig: {"monomer": MONOMER_V1},
        StructureModuleConfig: {"monomer": structure_module(MONOMER_V1, "affine_update")},
        PredictedLDDTConfig: {"monomer": CONFIDENCE},
    },
    forms={
        "monomer": Form(
            scalar_bias=True,
            point_bias=True,
            norm_form="add",
            norm_epsilon=1e-8,
            one_width=True,
            may_lack_biases=True,  # as ABodyBuilder3's with ipa_bias=False
        ),
    },
    landmarks={
        StructureModuleConfig: ("layer_norm_s.weight", "ipa.head_weights", "ipa.linear_q_points.weight"),
        IPAConfig: ("head_weights", "linear_q_points.weight"),
        PredictedLDDTConfig: CONFIDENCE_LANDMARKS,
    },
    absent=("down_z.weight", "linear_k.weight", "ipa.linear_k.weight"),  # the latter are Uni-Fold's
    at=lambda root, kind: _anywhere(root, kind) and not lies_in_esmfold(root),
    transitions=3,
    shared={IPAConfig: ("norm_epsilon", "frame_unit")},  # ABodyBuilder3's are 1e-7 and Å
)
