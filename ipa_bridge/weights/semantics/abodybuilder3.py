"""The computation of ABodyBuilder3's structure module, which is also Ibex's; its attention is OpenFold 1's."""

from __future__ import annotations

from ipa_bridge.weights.semantics.openfold import OPENFOLD_V1
from ipa_bridge.weights.semantics.system import System

ABODYBUILDER3 = System(
    OPENFOLD_V1.attention,
    {
        "initial_projection": "linear_in_node",
        "pair_projection": "linear_in_edge",
        "invariant_point_attention/": "ipa_layers.{fold}.",
        "attention_layer_norm": "layer_norm_ipa_layers.{fold}",
        "transition": "transition_layers.{fold}.layers.0.linear_{1}",
        "transition_layer_norm": "transition_layers.{fold}.layer_norm",
        "affine_update": "bb_update_layers.{fold}.linear",
        "rigid_sidechain/input_projection": "angle_resnet_layers.{fold}.linear_in",
        "rigid_sidechain/input_projection_1": "angle_resnet_layers.{fold}.linear_initial",
        "rigid_sidechain/resblock0": "angle_resnet_layers.{fold}.layers.{0}.linear_1",
        "rigid_sidechain/resblock1": "angle_resnet_layers.{fold}.layers.{0}.linear_2",
        "rigid_sidechain/resblock2": "angle_resnet_layers.{fold}.layers.{0}.linear_3",
        "rigid_sidechain/unnormalized_angles": "angle_resnet_layers.{fold}.linear_out",
    },
    fold_iteration="{0}",
)
