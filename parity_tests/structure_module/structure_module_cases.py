"""Structure modules of odd sizes, their start frames, and the comparison of two runs."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from ipa_bridge.config import StructureModuleConfig
from ipa_bridge.proteins.frames import idealised_peptide
from ipa_parity.attention.cases import ODD, ODD_MULTIMER
from ipa_parity.report import compare
from ipa_parity.structure_module.cases import make_case

ODD_MODULE = StructureModuleConfig(
    ipa=replace(ODD, frame_unit=None),
    num_layer=3,
    num_layer_in_transition=2,
    dropout=0.2,
    position_scale=7.0,
    sidechain_channel=5,
    num_residual_block=3,
)
ODD_MULTIMER_MODULE = replace(
    ODD_MODULE, ipa=replace(ODD_MULTIMER, frame_unit=None), num_layer_in_transition=3, num_residual_block=1
)
UNTIED_MODULE = replace(ODD_MODULE, tied_layers=False)
EMBEDDED_MODULE = replace(
    ODD_MODULE,
    transition_factor=2,
    single_input_channel=7,
    pair_input_channel=9,
    input_norm=False,
    distance_channel=True,
    project_initial_act=True,
    detach_rotations=False,
    smallest_angle_length=0.03,
)
"""ABodyBuilder3's form, with shared weights."""
CONCATENATED_MODULE = replace(
    ODD_MODULE,
    ipa=replace(ODD_MODULE.ipa, scalar_bias=False, point_bias=False, attention_2d_bias=False),
    tied_layers=False,
    single_input_channel=7,
    distance_channel=True,
    project_initial_act=True,
    skip_connection=True,
    sidechain_input="concatenated",
    sidechain_channel=2 * ODD_MODULE.num_channel,
    num_layer_in_residual_block=3,
)
"""The other form of ABodyBuilder3's attention and side chains, Ibex's skip connection, and layer norms."""
CONFIGS = {
    "odd": ODD_MODULE,
    "odd multimer": ODD_MULTIMER_MODULE,
    "untied": UNTIED_MODULE,
    "untied multimer": replace(ODD_MULTIMER_MODULE, tied_layers=False, num_layer=2),
    "embedded": EMBEDDED_MODULE,
    "concatenated": CONCATENATED_MODULE,
}


def start_of(case):
    """Frames of the idealised peptide as (rotation, translation)."""
    peptide, (*batch, number, _) = idealised_peptide(), case.single.shape
    return (
        np.broadcast_to(peptide.rotation[:number], (*batch, number, 3, 3)).astype(case.single.dtype),
        np.broadcast_to(peptide.translation[:number], (*batch, number, 3)).astype(case.single.dtype),
    )


@cache
def odd_case(name="odd", dtype="float64"):
    return make_case(name, CONFIGS[name]).astype(dtype)


def assert_same(actual, expected, dtype="float64", rows=slice(None), conditioning=1.0):
    """Asserts that every layer of every output agrees within the tolerance table."""
    assert set(actual) == set(expected)
    for stage, x in expected.items():
        conditions = conditioning
        if stage.startswith(("angles", "atom14", "group_")):
            lengths = np.linalg.norm(expected[f"unnormalized_angles/{stage.partition('/')[2]}"], axis=-1)
            conditions *= lengths.mean() / lengths.min()
        row = compare(
            actual[stage][rows],
            x[rows],
            case="",
            stage=stage,
            dtype=dtype,
            subject="other",
            reference="one",
            conditioning=conditions,
        )
        assert row.passed, str(row)


def batch_of(*cases):
    """One case with a batch axis; weights and target of the first."""
    stacked = {name: np.stack([getattr(x, name) for x in cases]) for name in ("single", "pair", "aatype", "mask")}
    return replace(cases[0], **stacked)
