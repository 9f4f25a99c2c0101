"""Models of several systems, and their weights under each system's names."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ipa_bridge.config import (
    IPABlockConfig,
    IPAConfig,
    IPATransformerConfig,
    PredictedLDDTConfig,
    StructureModuleConfig,
)
from ipa_bridge.kinds import replace_attention
from ipa_bridge.weights import Weights
from ipa_bridge.weights.conversion import Conversion
from ipa_bridge.weights.dialects import find_dialect
from ipa_bridge.weights.translation import in_dialect
from ipa_parity.attention.cases import ODD, ODD_DOWN_Z, ODD_MULTIMER, ODD_NO_BIAS

ONE_WIDTH = replace(ODD, num_scalar_v=ODD.num_scalar_qk)
SMALL_MODULE = StructureModuleConfig(ipa=ONE_WIDTH, sidechain_channel=5, num_layer=8)
"""Odd, distinct widths, for systems with one width for scalar queries, keys and values."""
ABODYBUILDER2 = replace(
    ONE_WIDTH,
    layout="multimer",
    scalar_bias=False,
    point_bias=False,
    distance_form="unsquared",
    distance_epsilon=1e-8,
    point_weight_form="identity",
    attention_2d_bias=False,
    frame_unit=1.0,
)
FLASHABB = replace(
    ONE_WIDTH,
    pair_channel=128,
    pair_bias=False,
    logit_terms=3,
    rotary_embedding=True,
    norm_epsilon=1e-7,
    frame_unit=1.0,
)
ABODYBUILDER3 = replace(
    StructureModuleConfig.abodybuilder3(c_s=7, c_z=9),
    ipa=replace(ONE_WIDTH, norm_epsilon=1e-7),
    num_layer=3,
    sidechain_channel=5,
    num_residual_block=2,
)
WITHOUT_BIASES = replace(
    ABODYBUILDER3,
    ipa=replace(ABODYBUILDER3.ipa, scalar_bias=False, point_bias=False, attention_2d_bias=False),
    sidechain_input="concatenated",
    sidechain_channel=2 * ONE_WIDTH.num_channel,
    num_layer_in_residual_block=3,
)
FRAMEDIFF = replace(ODD_DOWN_Z, num_scalar_v=ODD.num_scalar_qk, pair_channel=8, pair_value_channel=2)

NATIVE = {
    "alphafold monomer": ("alphafold", ODD),
    "alphafold multimer": ("alphafold", ODD_MULTIMER),
    "openfold": ("openfold", ONE_WIDTH),
    "openfold multimer": (
        "openfold",
        replace(ONE_WIDTH, layout="multimer", scalar_bias=False, norm_form="clamp", frame_unit=20.0),
    ),
    "openfold_v1": ("openfold_v1", ONE_WIDTH),
    "esmfold": ("esmfold", replace(ONE_WIDTH, point_weight_init=0.0)),
    "framediff": ("framediff", FRAMEDIFF),
    "frameflow": ("frameflow", FRAMEDIFF),
    "mdgen": ("mdgen", replace(ONE_WIDTH, pair_channel=None, logit_terms=3, frame_unit=1.0)),
    "unifold": ("unifold", replace(ONE_WIDTH, layout="multimer", scalar_bias=False, frame_unit=20.0)),
    "openfold_v1 without biases": (
        "openfold_v1",
        replace(ONE_WIDTH, scalar_bias=False, point_bias=False, attention_2d_bias=False),
    ),
    "lucidrains": ("lucidrains", ODD_NO_BIAS),
    "abodybuilder2": ("abodybuilder2", ABODYBUILDER2),
    "flashabb": ("flashabb", FLASHABB),
    "flashabb without spectra": ("flashabb", replace(FLASHABB, pair_channel=None, pair_bias=True)),
    "lucidrains without pair": ("lucidrains", replace(ODD_NO_BIAS, pair_channel=None)),
    "bioemu": ("bioemu", IPAConfig.bioemu(12, d_pair=5, n_head=3)),
    "omegafold": ("omegafold", replace(ODD, layout="multimer", norm_epsilon=0.0)),
    "lucidrains block": ("lucidrains", IPABlockConfig.lucidrains(6, heads=2, ff_mult=2)),
    "lucidrains transformer": (
        "lucidrains",
        IPATransformerConfig.lucidrains(
            6, depth=12, num_tokens=5, predict_points=True, original_composition_order=True, heads=2
        ),
    ),
    "igfold": ("igfold", ODD_NO_BIAS),
    "igfold block": ("igfold", IPABlockConfig.lucidrains(6, heads=2)),
    "igfold transformer": ("igfold", IPATransformerConfig.igfold(6, depth=3, heads=2)),
    "lociparse": ("lociparse", ONE_WIDTH),
    "alphafold structure module": ("alphafold", SMALL_MODULE),
    "openfold structure module": ("openfold", SMALL_MODULE),
    "openfold_v1 structure module": ("openfold_v1", SMALL_MODULE),
    "openfold multimer structure module": (
        "openfold",
        replace(SMALL_MODULE, ipa=replace(ONE_WIDTH, layout="multimer", scalar_bias=False, norm_form="clamp")),
    ),
    "esmfold structure module": ("esmfold", SMALL_MODULE),
    "abodybuilder3 structure module": ("abodybuilder3", ABODYBUILDER3),
    "abodybuilder3 structure module without biases": ("abodybuilder3", WITHOUT_BIASES),
    "ibex structure module": ("ibex", replace(ABODYBUILDER3, skip_connection=True)),
    "alphafold confidence head": ("alphafold", PredictedLDDTConfig(num_channel=5, hidden_channel=4, num_bin=3)),
    "openfold confidence head": ("openfold", PredictedLDDTConfig(num_channel=5, hidden_channel=4, num_bin=3)),
}
"""Cases by name: the system whose parameters they are, and the config."""


def state_of(weights: Weights, dialect: str) -> dict[str, np.ndarray]:
    return in_dialect(weights.arrays, weights.config, find_dialect(dialect))


def convert(weights: Weights, dialect: str, **options) -> tuple[Weights, Conversion]:
    return weights.converted(find_dialect(dialect), **options)


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (x.dtype, x.shape), name
        assert actual[name].tobytes() == x.tobytes(), name


def replace_untold(config):
    """The config with fixed values in the fields that names and shapes do not determine."""
    if isinstance(config, StructureModuleConfig):
        ipa = replace(replace_untold(config.ipa), frame_unit=1.0)
        return replace(config, ipa=ipa, position_scale=1.0, skip_connection=False)
    if isinstance(config, IPAConfig):
        return replace(config, zero_init=True, point_weight_init=0.0)
    if isinstance(config, IPABlockConfig | IPATransformerConfig):
        return replace_attention(config, replace_untold(config.ipa))
    return config
