"""ABodyBuilder3 and Ibex: one structure module without shared weights, whose attentions have OpenFold 1's names.

Both embed one-hot inputs, have frames in Å, and add a channel of distances to the pair in every layer. Ibex may add the
embedded inputs after each layer, which names and shapes do not show.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

from ipa_bridge.config import Config, StructureModuleConfig
from ipa_bridge.weights.dialects.openfold import MONOMER_V1
from ipa_bridge.weights.dialects.spec import Dialect, Form, Row, within

_LAYER = "fold_iteration{}/"
_ANGLES = "angle_resnet_layers.{0}."

STRUCTURE_MODULE = (
    Row("initial_projection", "linear_in_node"),
    Row("pair_projection", "linear_in_edge"),
    *within(f"{_LAYER}invariant_point_attention/", "ipa_layers.{0}.", MONOMER_V1),
    Row(f"{_LAYER}attention_layer_norm", "layer_norm_ipa_layers.{0}"),
    Row(f"{_LAYER}transition{{}}", "transition_layers.{0}.layers.0.linear_{1}"),
    Row(f"{_LAYER}transition_layer_norm", "transition_layers.{0}.layer_norm"),
    Row(f"{_LAYER}affine_update", "bb_update_layers.{0}.linear"),
    Row(f"{_LAYER}rigid_sidechain/input_projection", f"{_ANGLES}linear_in"),
    Row(f"{_LAYER}rigid_sidechain/input_projection_1", f"{_ANGLES}linear_initial"),
    *(
        Row(f"{_LAYER}rigid_sidechain/resblock{k}{{}}", f"{_ANGLES}layers.{{0}}.linear_{k + 1}")
        for k in range(3)  # the first of three is there only without `use_original_sm`
    ),
    Row(f"{_LAYER}rigid_sidechain/unnormalized_angles", f"{_ANGLES}linear_out"),
)


def _finish(config: Config) -> Config:
    c = cast(StructureModuleConfig, config)
    return replace(
        c,
        ipa=replace(c.ipa, norm_epsilon=1e-7),
        num_layer=1 if c.tied_layers else c.num_layer,
        tied_layers=False,
        position_scale=1.0,
        project_initial_act=True,
        detach_rotations=False,
        smallest_angle_length=math.sqrt(1e-7),
    )


def _refuse(config: StructureModuleConfig) -> str:
    """The reason why no arguments of the constructor give this module; "" if some do."""
    c, ipa = config, config.ipa
    biases = {ipa.scalar_bias, ipa.point_bias, ipa.attention_2d_bias}
    if c.pair_input_channel is None:
        return "it projects the pair representation: pair_input_channel must be its width"
    if not math.isclose(ipa.norm_epsilon, c.smallest_angle_length**2):
        return (
            f"its epsilon is norm_epsilon and the square of smallest_angle_length, which must be equal; got "
            f"{ipa.norm_epsilon:g} and {c.smallest_angle_length:g}²"
        )
    if biases == {c.sidechain_input == "summed"} == {c.num_layer_in_residual_block == 2}:
        return ""
    return (
        "its use_original_sm is one switch for scalar_bias, point_bias and attention_2d_bias (True or False), "
        "sidechain_input ('summed' or 'concatenated') and num_layer_in_residual_block (2 or 3)"
    )


ABODYBUILDER3 = Dialect(
    name="abodybuilder3",
    title="ABodyBuilder3",
    rows={StructureModuleConfig: {"monomer": STRUCTURE_MODULE}},
    forms={
        "monomer": Form(
            scalar_bias=None,
            point_bias=None,
            norm_form="add",
            norm_epsilon=1e-7,
            one_width=True,
            others={"attention_2d_bias": None},
        )
    },
    landmarks={
        StructureModuleConfig: ("linear_in_node.weight", "linear_in_edge.weight", "ipa_layers.0.head_weights"),
    },
    absent=("plm_in.0.weight",),
    finish=_finish,
    epsilon_argument="epsilon",
    transitions=3,
    shared={StructureModuleConfig: ("skip_connection",)},  # Ibex may have one
    structure={
        "tied_layers": False,
        "transition_factor": 2,
        "input_norm": False,
        "distance_channel": True,
        "project_initial_act": True,
        "skip_connection": False,
    },
    published=lambda layout: StructureModuleConfig.abodybuilder3(),
    refuse=_refuse,
    other_modules={StructureModuleConfig: {"plddt": "the confidence head, which `root=` reads"}},
)

IBEX = replace(
    ABODYBUILDER3,
    name="ibex",
    title="Ibex",
    absent=(),
    shared={},
    varies=("skip_connection",),
    structure={field: x for field, x in ABODYBUILDER3.structure.items() if field != "skip_connection"},
    other_modules={
        StructureModuleConfig: {
            **ABODYBUILDER3.other_modules[StructureModuleConfig],
            "plm_in": "the embedding of a language model's output, which the caller appends to the single "
            "representation",
        }
    },
)
