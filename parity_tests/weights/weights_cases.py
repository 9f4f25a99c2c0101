"""Configs whose weights are tested, and checks of their arrays."""

from __future__ import annotations

from ipa_bridge.config import (
    IPAConfig,
    PredictedLDDTConfig,
    StructureModuleConfig,
)
from ipa_parity.attention.cases import ODD, ODD_DOWN_Z, ODD_MULTIMER, ODD_NO_BIAS, ODD_NO_PAIR

CONFIGS = {
    "alphafold2": IPAConfig.alphafold2(),
    "alphafold-multimer": IPAConfig.alphafold_multimer(),
    "esmfold": IPAConfig.esmfold(),
    "lucidrains": IPAConfig.lucidrains(64, eps=1e-5),
    "odd": ODD,
    "odd multimer": ODD_MULTIMER,
    "no pair": ODD_NO_PAIR,
    "no bias": ODD_NO_BIAS,
    "framediff": IPAConfig.framediff(),
    "down_z": ODD_DOWN_Z,
    "structure module": StructureModuleConfig.alphafold2(),
    "structure module multimer": StructureModuleConfig(ipa=ODD_MULTIMER, position_scale=20.0, sidechain_channel=5),
    "untied structure module": StructureModuleConfig(
        ipa=ODD, num_layer=3, tied_layers=False, num_layer_in_transition=2
    ),
    "embedded structure module": StructureModuleConfig.abodybuilder3(c_s=7, c_z=5, embed_dim=6),
    "confidence head": PredictedLDDTConfig(),
}
DTYPES = ("float64", "float32", "float16", "bfloat16")
FULL_ROOT = "alphafold/alphafold_iteration/structure_module/fold_iteration/invariant_point_attention"


def assert_same_bits(actual, expected):
    assert list(actual) == list(expected)
    for name, x in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (x.dtype, x.shape), name
        assert actual[name].tobytes() == x.tobytes(), name


ITERATION = "alphafold/alphafold_iteration"
