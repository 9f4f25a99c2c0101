"""Configs say what a model is, and impossible ones cannot be made; the manifest lists AlphaFold's own parameters."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace

import pytest

from ipa_bridge.config import IPAConfig
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
    "epsilon zero": ({"norm_epsilon": 0.0}, "norm_epsilon must be a positive number.*gradient"),
    "epsilon nan": ({"norm_epsilon": math.nan}, "norm_epsilon must be a positive number"),
    "weight": ({"point_weight_init": math.inf}, "point_weight_init must be finite"),
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


def alphafold_shapes(layout):
    """Names and shapes that alphafold-colabfold's own attention initialises, without computing them."""
    jax = pytest.importorskip("jax")
    hk = pytest.importorskip("haiku")
    pytest.importorskip("alphafold", reason="alphafold-colabfold is not installed")
    import jax.numpy as jnp
    import ml_collections
    from alphafold.model import config as alphafold_config
    from alphafold.model import folding, folding_multimer, quat_affine
    from alphafold.model.geometry import Rigid3Array

    model = alphafold_config.model_config("model_1" if layout == "monomer" else "model_1_multimer_v3").model
    global_config = ml_collections.ConfigDict(model.global_config)

    def forward(single, pair, mask):
        if layout == "monomer":
            frames = quat_affine.QuatAffine(jnp.eye(4)[jnp.zeros(5, int)], list(jnp.zeros((3, 5))))
            module = folding.InvariantPointAttention
        else:
            frames = Rigid3Array.identity((5,))
            module = folding_multimer.InvariantPointAttention
        return module(model.heads.structure_module, global_config)(single, pair, mask, frames)

    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((5, 384), (5, 5, 128), (5, 1))]
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(False):
        params = jax.eval_shape(hk.transform(forward).init, jax.eval_shape(lambda: jax.random.key(0)), *arguments)
    return {f"{module}/{leaf}": x.shape for module, leaves in params.items() for leaf, x in leaves.items()}


@pytest.mark.parametrize(
    ("layout", "config"),
    [("monomer", IPAConfig.alphafold2()), ("multimer", IPAConfig.alphafold_multimer())],
)
def test_manifest_is_alphafolds_key_for_key(layout, config):
    ours = {f"invariant_point_attention/{name}": shape for name, shape in ipa_parameters(config).items()}
    assert alphafold_shapes(layout) == ours
