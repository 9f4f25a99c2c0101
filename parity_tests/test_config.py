"""Configs describe a model and refuse impossible values; the manifest lists AlphaFold's own parameters."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace

import pytest

from ipa_bridge.config import IPABlockConfig, IPAConfig, IPATransformerConfig, StructureModuleConfig
from ipa_bridge.parameters import ipa_parameters

IMPOSSIBLE = {
    "no head": ({"num_head": 0}, "num_head must be a positive integer; got 0"),
    "half a head": ({"num_head": 1.5}, "num_head must be a positive integer; got 1.5"),
    "true heads": ({"num_head": True}, "num_head must be a positive integer; got True"),
    "negative points": ({"num_point_v": -1}, "num_point_v must be a positive integer"),
    "zero pair": ({"pair_channel": 0}, "pair_channel must be .*; pass None for no pair"),
    "layout": ({"layout": "trimer"}, "layout must be one of monomer, multimer; got 'trimer'"),
    "norm": ({"norm_form": "max"}, "norm_form must be one of add, clamp; got 'max'"),
    "bias": ({"scalar_bias": 1}, "scalar_bias must be True or False; got 1"),
    "epsilon zero": ({"norm_epsilon": 0.0, "norm_form": "clamp"}, "norm_epsilon must be at least 1.1e-19"),
    "epsilon below zero": ({"norm_epsilon": -1e-8}, "norm_epsilon must be 0 or at least 1.2e-38"),
    "epsilon nan": ({"norm_epsilon": math.nan}, "norm_epsilon must be a finite number"),
    "epsilon text": ({"norm_epsilon": "1e-8"}, "norm_epsilon must be a finite number; got '1e-8'"),
    "epsilon lost in float32": ({"norm_epsilon": 1e-20, "norm_form": "clamp"}, "at least 1.1e-19, for float32"),
    "epsilon of squared distances": ({"distance_epsilon": 1e-8}, "must be 0 if distance_form is 'squared'"),
    "distance epsilon below zero": (
        {"distance_form": "unsquared", "distance_epsilon": -1e-8},
        "distance_epsilon must be 0 or at least 1.2e-38",
    ),
    "distance form": ({"distance_form": "cubed"}, "distance_form must be one of squared, unsquared; got 'cubed'"),
    "point weight form": ({"point_weight_form": "exp"}, "point_weight_form must be one of softplus, identity"),
    "logit terms": ({"logit_terms": 0}, "logit_terms must be a positive integer; got 0; pass None to count them"),
    "rotary width": ({"rotary_embedding": True, "num_scalar_qk": 5}, "num_scalar_qk must be even if rotary_embedding"),
    "values per head without a width": (
        {"pair_value_per_head": True},
        "pair_value_per_head needs a pair_value_channel",
    ),
    "pair bias": ({"pair_bias": 1}, "pair_bias must be True or False; got 1"),
    "narrowed nothing": ({"pair_channel": None, "pair_value_channel": 32}, "there is no pair to project"),
    "narrowed to nothing": (
        {"pair_value_channel": 0},
        "pair_value_channel must be a positive integer; got 0; pass None",
    ),
    "no unit": ({"position_scale": 0.0}, "position_scale must be positive; got 0.0"),
    "frames without a length": (
        {"frame_unit": 0.0},
        "frame_unit must be positive, in Å; got 0.0; pass None for unknown",
    ),
    "frames in words": ({"frame_unit": "nm"}, "frame_unit must be a finite number; got 'nm'; pass None for unknown"),
    "weight": ({"point_weight_init": math.inf}, "point_weight_init must be a finite number"),
}


@pytest.mark.parametrize(("change", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_configs_raise(change, message):
    with pytest.raises(ValueError, match=message):
        replace(IPAConfig.alphafold2(), **change)


def test_configs_are_frozen_values():
    assert IPAConfig.alphafold2() == IPAConfig.alphafold2()
    assert len({IPAConfig.alphafold2(), IPAConfig.alphafold2(), IPAConfig.esmfold()}) == 2
    with pytest.raises(FrozenInstanceError):
        IPAConfig.alphafold2().num_head = 1


def test_softplus_of_the_initial_point_weight_is_one():
    assert math.log1p(math.exp(IPAConfig.alphafold2().point_weight_init)) == pytest.approx(1, rel=1e-15)


def test_lucidrains_takes_the_packages_own_arguments():
    config = IPAConfig.lucidrains(64, heads=4, scalar_key_dim=8, point_value_dim=3, pairwise_repr_dim=32, eps=1e-6)
    assert (config.num_channel, config.pair_channel, config.num_head) == (64, 32, 4)
    assert (config.num_scalar_qk, config.num_point_v, config.norm_epsilon) == (8, 3, 1e-6)
    assert IPAConfig.lucidrains(64).pair_channel == 64
    assert IPAConfig.lucidrains(64, require_pairwise_repr=False).pair_channel is None


def test_a_structure_module_has_one_unit():
    with pytest.raises(ValueError, match=r"ipa\.position_scale must be 1 in a structure module.*got 10\.0"):
        StructureModuleConfig(ipa=IPAConfig.framediff())


FRAME_UNITS = {
    "alphafold2": (IPAConfig.alphafold2(), 10.0),
    "alphafold_multimer": (IPAConfig.alphafold_multimer(), 20.0),
    "esmfold": (IPAConfig.esmfold(), 10.0),
    "framediff": (IPAConfig.framediff(), 1.0),
    "lucidrains": (IPAConfig.lucidrains(64), None),
    "block": (IPABlockConfig(ipa=IPAConfig.alphafold2()), 10.0),
    "block of lucidrains": (IPABlockConfig.lucidrains(64), None),
    "transformer": (IPATransformerConfig(block=IPABlockConfig(ipa=IPAConfig.framediff()), num_layer=2), 1.0),
    "structure module, which takes Å": (StructureModuleConfig.alphafold_multimer(), 1.0),
}


@pytest.mark.parametrize(("config", "unit"), FRAME_UNITS.values(), ids=FRAME_UNITS)
def test_presets_know_the_unit_of_their_callers_frames(config, unit):
    assert config.frame_unit == unit


def test_the_unit_is_unknown_by_default():
    fields = {name: x for name, x in vars(IPAConfig.alphafold2()).items() if name != "frame_unit"}
    assert IPAConfig(**fields).frame_unit is None


def test_a_structure_modules_attention_takes_its_unit():
    for preset in (StructureModuleConfig.alphafold2(), StructureModuleConfig.alphafold_multimer()):
        assert preset.ipa.frame_unit == preset.position_scale
    wider = replace(StructureModuleConfig.alphafold2(), position_scale=15.0)
    assert wider.ipa == replace(IPAConfig.alphafold2(), frame_unit=15.0)
    unknown = replace(IPAConfig.alphafold2(), frame_unit=None)
    assert StructureModuleConfig(ipa=unknown) == StructureModuleConfig.alphafold2()


ALPHAFOLDS = {
    "monomer": ("model_1", IPAConfig.alphafold2()),
    "multimer": ("model_1_multimer_v3", IPAConfig.alphafold_multimer()),
}


@pytest.mark.parametrize("layout", ALPHAFOLDS)
def test_manifest_is_alphafolds_key_for_key(layout):
    """The manifest equals the parameters that alphafold-colabfold's own attention initialises, by name and shape."""
    jax = pytest.importorskip("jax")
    hk = pytest.importorskip("haiku")
    pytest.importorskip("alphafold", reason="alphafold-colabfold is not installed")
    from ipa_parity.peers import alphafold_forward

    _, config = ALPHAFOLDS[layout]
    shapes = ((5, config.num_channel), (5, 5, config.pair_channel), (5,), (5, 3, 3), (5, 3))
    arguments = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    # AlphaFold's multimer geometry asserts float32; with x64 on, its own float64 constants would fail that.
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(False):
        key = jax.eval_shape(lambda: jax.random.key(0))
        params = jax.eval_shape(hk.transform(alphafold_forward(config)).init, key, *arguments)
    theirs = {f"{module}/{leaf}": x.shape for module, leaves in params.items() for leaf, x in leaves.items()}
    assert theirs == {f"invariant_point_attention/{name}": shape for name, shape in ipa_parameters(config).items()}


@pytest.mark.parametrize("layout", ALPHAFOLDS)
def test_presets_have_alphafolds_widths(layout):
    alphafold_config = pytest.importorskip("alphafold.model.config", reason="alphafold-colabfold is not installed")
    name, config = ALPHAFOLDS[layout]
    model = alphafold_config.model_config(name).model
    theirs = model.heads.structure_module
    for width in ("num_channel", "num_head", "num_scalar_qk", "num_scalar_v", "num_point_qk", "num_point_v"):
        assert getattr(config, width) == theirs[width], width
    assert config.pair_channel == model.embeddings_and_evoformer.pair_channel
    assert config.zero_init == model.global_config.zero_init
