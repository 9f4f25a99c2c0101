"""The Haiku IPA as JAX users call it: transforms, dtypes, degenerate and bad inputs."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

jax = pytest.importorskip("jax")
hk = pytest.importorskip("haiku")

import jax.numpy as jnp
import numpy as np

import ipa_jax
from ipa_bridge.config import IPABlockConfig, IPAConfig, IPATransformerConfig, StructureModuleConfig
from ipa_bridge.parameters import ipa_parameters
from ipa_bridge.proteins.frames import idealised_peptide
from ipa_bridge.weights import Weights
from ipa_parity.attention.cases import CATALOGUE, ODD, ODD_DOWN_Z, ODD_MULTIMER, ODD_NO_BIAS, ODD_NO_PAIR, make_case
from ipa_parity.report import compare

ROOT = "invariant_point_attention"


def arguments(case, dtype="float32"):
    case = case.astype(dtype)
    single, rotation, translation, mask = map(jnp.asarray, (case.single, case.rotation, case.translation, case.mask))
    pair = None if case.pair is None else jnp.asarray(case.pair)
    params = jax.tree.map(jnp.asarray, case.weights.to_haiku())
    return params, single, pair, ipa_jax.Rigid(rotation, translation), mask


def judge(actual, expected, stage="out", dtype="float32"):
    row = compare(
        np.asarray(actual),
        np.asarray(expected),
        case="",
        stage=stage,
        dtype=dtype,
        subject="transformed",
        reference="plain",
    )
    assert row.passed, str(row)


@pytest.mark.parametrize(
    "config", [IPAConfig.alphafold2(), IPAConfig.alphafold_multimer(), ODD, ODD_MULTIMER, ODD_NO_PAIR]
)
def test_init_has_the_canonical_parameters(config):
    *_, single, pair, rigids, mask = arguments(make_case("", config, (3,)))
    params = jax.eval_shape(ipa_jax.transform_ipa(config).init, jax.random.key(0), single, pair, rigids, mask)
    shapes = {f"{module}/{leaf}": x.shape for module, leaves in params.items() for leaf, x in leaves.items()}
    assert shapes == {f"{ROOT}/{name}": shape for name, shape in ipa_parameters(config).items()}
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}


@pytest.mark.parametrize("rng", [None, jax.random.key(0), jax.random.PRNGKey(0)], ids=["None", "key", "PRNGKey"])
def test_a_misplaced_rng_raises(rng):
    params, *inputs = arguments(CATALOGUE["monomer"]())
    for given in (inputs, inputs[:-1]):
        with pytest.raises(ValueError, match=r"takes no rng, .*; got (None|one) after params: leave it out"):
            ipa_jax.transform_ipa(ODD).apply(params, rng, *given)


def test_a_missing_rng_raises():
    config = IPATransformerConfig(block=IPABlockConfig(ipa=ODD_NO_PAIR, attention_dropout=0.5), num_layer=1)
    apply = ipa_jax.transform_ipa_transformer(config).apply
    params = Weights.random(config).to_haiku()
    single = jnp.zeros((3, ODD.num_channel))
    with pytest.raises(ValueError, match=r"takes an rng after the parameters, or None where .*; got an array of float"):
        apply(params, single)
    with pytest.raises(ValueError, match="takes an rng after the parameters"):
        apply(params)
    assert apply(params, 0, single, is_training=True).act.shape == single.shape
    assert apply(params, single=single, rng=None).act.shape == single.shape
    with pytest.raises(ValueError, match="must pass a non-None PRNGKey"):
        apply(params, None, single, is_training=True)


@pytest.mark.parametrize("zero_init", [True, False])
def test_initial_values(zero_init):
    config = replace(IPAConfig.esmfold(), zero_init=zero_init)
    *_, single, pair, rigids, mask = arguments(make_case("", config, (3,)))
    params = ipa_jax.transform_ipa(config).init(jax.random.key(0), single, pair, rigids, mask)
    assert (params[ROOT]["trainable_point_weights"] == 0).all()
    assert (params[f"{ROOT}/output_projection"]["weights"] == 0).all() == zero_init
    assert (params[f"{ROOT}/q_scalar"]["weights"] != 0).all()
    assert all((leaves["bias"] == 0).all() for module, leaves in params.items() if module != ROOT)


def test_jit_vmap_and_checkpoint_are_the_same_function():
    case = CATALOGUE["batch"]()
    params, *inputs = arguments(case)
    apply = ipa_jax.transform_ipa(case.config).apply
    expected = apply(params, *inputs)
    for function in (apply, jax.vmap(apply, (None, 0, 0, 0, 0)), jax.checkpoint(apply)):
        judge(jax.jit(function)(params, *inputs), expected)


def test_gradients_through_jit_vmap_and_checkpoint():
    case = CATALOGUE["batch"]()
    params, single, pair, rigids, mask = arguments(case)
    apply = ipa_jax.transform_ipa(case.config).apply

    def gradient(function):
        scalar = lambda *xs: (function(params, *xs, mask) * case.cotangent.astype("float32")).sum()  # noqa: E731
        return jax.jit(jax.grad(scalar, (0, 1, 2)))

    expected = gradient(apply)(single, pair, rigids)
    for function in (jax.checkpoint(apply), jax.jit(apply), jax.vmap(apply, (None, 0, 0, 0, 0))):
        actual = gradient(function)(single, pair, rigids)
        jax.tree.map(lambda x, wanted: judge(x, wanted, "gradient"), actual, expected)


def test_forward_mode_agrees_with_reverse_mode():
    case = CATALOGUE["monomer"]()
    params, single, pair, rigids, mask = arguments(case, "float64")
    apply = ipa_jax.transform_ipa(case.config, implementation="reference").apply
    direction = jnp.asarray(np.random.default_rng(0).standard_normal(single.shape))
    loss = lambda s: (apply(params, s, pair, rigids, mask) * case.cotangent).sum()  # noqa: E731
    forward = jax.jit(lambda s: jax.jvp(loss, (s,), (direction,))[1])(single)
    judge([forward], [(jax.jit(jax.grad(loss))(single) * direction).sum()], "gradient", "float64")


def test_inside_someone_elses_transform():
    def model(single, pair, rigids, mask):
        single = hk.Linear(ODD.num_channel)(single)
        return ipa_jax.InvariantPointAttention(ODD, name="ipa_of_mine")(single, pair, rigids, mask)

    _, *inputs = arguments(CATALOGUE["monomer"]())
    init, apply = hk.without_apply_rng(hk.transform(model))
    params = init(jax.random.key(0), *inputs)
    assert apply(params, *inputs).shape == inputs[0].shape
    assert {name.split("/")[0] for name in params} == {"linear", "ipa_of_mine"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_output_has_the_inputs_dtype_and_attention_at_least_float32(dtype):
    case = CATALOGUE["monomer"]()
    params, *inputs = arguments(case, dtype)
    apply = ipa_jax.transform_ipa(case.config).apply
    out, attention = apply(params, *inputs, return_attention=True)
    assert out.dtype == dtype
    assert attention.dtype == ("float64" if dtype == "float64" else "float32")
    judge(attention.sum(-1), np.ones(attention.shape[:-1]), "attention", "float32")
    initial = ipa_jax.transform_ipa(case.config).init(jax.random.key(0), *inputs)
    assert initial[f"{ROOT}/q_scalar"]["weights"].dtype == dtype


def test_half_precision_activations_with_float32_parameters():
    case = CATALOGUE["spread-50"]()
    params, *_ = arguments(case, "float32")
    _, single, pair, rigids, mask = arguments(case, "bfloat16")
    apply = ipa_jax.transform_ipa(case.config).apply
    out = apply(params, single, pair, rigids, mask)
    exact = apply(params, *(x.astype("float32") for x in (single, pair, rigids)), mask)
    assert out.dtype == jnp.bfloat16
    judge(out.astype("float32"), exact, "out", "bfloat16")


@pytest.mark.parametrize("activations", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("frames", ["float16", "float32", "float64"])
def test_frames_do_not_decide_the_dtype(activations, frames):
    """The activations do, at least float32: a protein's frames come in float64."""
    case = CATALOGUE["monomer"]()
    params, single, pair, rigids, mask = arguments(case, activations)
    apply = partial(ipa_jax.transform_ipa(case.config).apply, return_attention=True)
    out, attention = jax.eval_shape(apply, params, single, pair, rigids.astype(frames), mask)
    assert (out.dtype, attention.dtype) == (activations, "float64" if activations == "float64" else "float32")


def test_numpy_frames_in_float64_where_jax_has_none():
    """`load_structure` returns such frames; a warning would be an error here."""
    case = CATALOGUE["monomer"]()
    with jax.enable_x64(False):
        params, single, pair, _, mask = arguments(case)
        rigids = ipa_jax.Rigid(case.rotation, case.translation)
        assert rigids.translation.dtype == "float64"
        apply = ipa_jax.transform_ipa(case.config).apply
        out = jax.eval_shape(lambda: apply(params, single, pair, rigids, mask))
        assert out.dtype == "float32"


def test_frames_of_a_transformer_have_its_activations_dtype():
    config = IPATransformerConfig.lucidrains(8, depth=1, heads=2, require_pairwise_repr=False)
    init, apply = ipa_jax.transform_ipa_transformer(config)
    act, rigids = jnp.ones((5, 8), jnp.float32), ipa_jax.Rigid.identity((5,), dtype="float64")
    params = jax.eval_shape(init, jax.random.key(0), act, None, rigids)
    moved = jax.eval_shape(apply, params, None, act, None, rigids).rigids
    assert {x.dtype for x in moved} == {np.dtype("float32")}


@pytest.mark.parametrize("kind", [bool, "int32", "float32", "float16"])
def test_masks_of_any_dtype(kind):
    params, *inputs, mask = arguments(CATALOGUE["monomer"]())
    apply = ipa_jax.transform_ipa(ODD).apply
    assert (apply(params, *inputs, mask.astype(kind)) == apply(params, *inputs, mask)).all()


def test_masked_residues_are_ignored_by_valid_ones():
    params, single, pair, rigids, mask = arguments(CATALOGUE["monomer"]())
    apply = ipa_jax.transform_ipa(ODD).apply
    hidden = (~mask[:, None]).astype(single.dtype)
    moved = ipa_jax.Rigid(rigids.rotation, rigids.translation + 5 * hidden)
    changed = apply(params, single + 3 * hidden, pair, moved, mask)
    judge(changed[mask], apply(params, single, pair, rigids, mask)[mask])
    assert (jnp.abs(changed - apply(params, single, pair, rigids, mask))[~mask] > 1e-3).any()


@pytest.mark.covering
@pytest.mark.parametrize("config", [ODD, ODD_MULTIMER, ODD_NO_PAIR])
@pytest.mark.parametrize("residues", [0, 1])
def test_no_residue_and_one_residue(config, residues):
    params, *inputs = arguments(make_case("", config, (residues,)))
    apply = ipa_jax.transform_ipa(config).apply
    out, gradient = jax.jit(jax.value_and_grad(lambda s: apply(params, s, *inputs[1:]).sum()))(inputs[0])
    assert gradient.shape == (residues, config.num_channel)
    assert np.isfinite(out)
    assert np.isfinite(gradient).all()


def test_everything_masked_is_finite():
    params, single, pair, rigids, mask = arguments(CATALOGUE["monomer"]())
    apply = ipa_jax.transform_ipa(ODD).apply
    loss = lambda *xs: apply(*xs, jnp.zeros_like(mask)).sum()  # noqa: E731
    for leaf in jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(params, single, pair, rigids)):
        assert np.isfinite(leaf).all()


def test_coincident_frames_have_finite_gradients():
    """Every local point at its frame's origin: the norms' gradients are finite in both forms."""
    for config in (ODD, ODD_MULTIMER):
        params, single, pair, rigids, mask = arguments(make_case("", config, (5,)))
        still = ipa_jax.Rigid(rigids.rotation, jnp.zeros_like(rigids.translation))
        for module in (name for name in params if "point" in name):
            params[module] = jax.tree.map(jnp.zeros_like, params[module])
        apply = partial(ipa_jax.transform_ipa(config).apply, params)
        scalar = lambda s, r, apply=apply, z=pair, m=mask: apply(s, z, r, m).sum()  # noqa: E731
        gradients = jax.jit(jax.grad(scalar, (0, 1)))(single, still)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_nan_is_never_hidden():
    params, single, *inputs = arguments(CATALOGUE["monomer"]())
    assert np.isnan(ipa_jax.transform_ipa(ODD).apply(params, single.at[0, 0].set(np.nan), *inputs)[0]).all()


def in_angstroms(config=ODD):
    """A peptide's frames in Å, whatever the config's unit is."""
    params, single, pair, rigids, mask = arguments(make_case("", config, structure=idealised_peptide()))
    steps = jnp.linalg.norm(jnp.diff(rigids.translation, axis=0), axis=-1)
    return params, single, pair, rigids.scale_translation(3.8 / jnp.median(steps)), mask


IN_ANGSTROMS = r"in units of 10 Å.*median of 3\.8 units apart"


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "numpy", "no mask", "batch", "block"])
def test_angstroms_are_warned_of_where_ten_are_a_unit(kind):
    params, single, pair, rigids, mask = in_angstroms()
    apply = ipa_jax.transform_ipa(ODD).apply
    if kind == "bfloat16":
        rigids = rigids.astype(jnp.bfloat16)
    elif kind == "numpy":
        rigids, mask = ipa_jax.Rigid(*map(np.asarray, rigids)), np.asarray(mask)
    elif kind == "no mask":
        mask = None
    elif kind == "batch":
        single, pair, rigids, mask = jax.tree.map(lambda x: jnp.stack([x, x]), (single, pair, rigids, mask))
    elif kind == "block":
        config = IPABlockConfig(ipa=ODD)
        apply = hk.without_apply_rng(hk.transform(lambda *xs: ipa_jax.IPABlock(config)(*xs))).apply
        params = jax.tree.map(jnp.asarray, Weights.random(config).to_haiku())
    with pytest.warns(UserWarning, match=IN_ANGSTROMS):
        apply(params, single, pair, rigids, mask)


def test_angstroms_are_warned_of_once():
    inputs = in_angstroms()
    apply = ipa_jax.transform_ipa(ODD).apply
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            apply(*inputs)
    assert [x.category for x in caught if x.category is not DeprecationWarning] == [UserWarning]


@pytest.mark.parametrize(
    "config",
    [replace(ODD, frame_unit=None), ODD_NO_BIAS, ODD_DOWN_Z, replace(ODD, position_scale=10.0)],
    ids=["unknown", "lucidrains", "framediff", "divides itself"],
)
def test_angstroms_are_not_warned_of_where_they_are_meant_or_may_be(config):
    ipa_jax.transform_ipa(config).apply(*in_angstroms(config))


def test_angstroms_are_not_warned_of_within_a_structure_module():
    config = StructureModuleConfig(ipa=ODD, num_layer=1, tied_layers=False, sidechain_channel=5)
    _, single, pair, rigids, mask = in_angstroms()
    params = jax.tree.map(jnp.asarray, Weights.random(config).to_haiku())
    in_its_unit = rigids.scale_translation(config.position_scale)
    module = ipa_jax.transform_structure_module(config)
    module.apply(params, None, single, pair, mask.astype(int), mask, rigids=in_its_unit)


@pytest.mark.parametrize("layout", ["monomer", "multimer"])
def test_angstroms_are_not_warned_of_in_replaced_layers(layout):
    folding = pytest.importorskip(f"alphafold.model.folding{'_multimer' * (layout == 'multimer')}")
    config = replace(ODD, layout=layout)
    fields = ("num_channel", "num_head", "num_scalar_qk", "num_scalar_v", "num_point_qk", "num_point_v")
    widths = SimpleNamespace(**{field: getattr(config, field) for field in fields})
    with ipa_jax.replace_alphafold_ipa(verify=False):
        build = partial(folding.InvariantPointAttention, widths, SimpleNamespace(zero_init=False))
        unit = hk.without_apply_rng(hk.transform(lambda: build().config.frame_unit)).apply({})
    assert unit is None


def test_angstroms_are_not_warned_of_under_traces_and_transforms():
    """The check breaks none of these transformations."""
    params, single, pair, rigids, mask = in_angstroms()
    apply = ipa_jax.transform_ipa(ODD, implementation="reference").apply
    call = lambda t: apply(params, single, pair, ipa_jax.Rigid(rigids.rotation, t), mask)  # noqa: E731
    jax.eval_shape(ipa_jax.transform_ipa(ODD).init, jax.random.key(0), single, pair, rigids, mask)
    constant = lambda p: apply(p, single, pair, rigids, mask)  # noqa: E731
    jax.eval_shape(constant, params)  # where only the parameters are traced
    jax.eval_shape(call, rigids.translation)
    jax.vmap(call)(jnp.stack([rigids.translation] * 2))
    jax.grad(lambda t: call(t).sum())(rigids.translation)
    with pytest.warns(UserWarning, match=IN_ANGSTROMS):  # the frames' values can be read
        jax.grad(lambda p: constant(p).sum())(params)
    jax.jvp(call, (rigids.translation,), (rigids.translation,))


def test_geometry_and_attention_ask_for_full_precision():
    """Without Precision.HIGHEST a product may run in TF32 or bfloat16 on a GPU or TPU; only scalar projections may."""
    for config in (ODD, ODD_MULTIMER):
        params, *inputs = arguments(make_case("", config, (5,)))
        apply = ipa_jax.transform_ipa(config, implementation="reference").apply
        with jax.default_matmul_precision("default"):
            jaxpr = jax.make_jaxpr(apply)(params, *inputs)
        highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
        products = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
        free = [eqn for eqn in products if eqn.params["precision"] != highest]
        scalars = 2 if config.layout == "monomer" else 3
        assert len(free) == scalars + 1, "the scalars' projections and the output's"
        assert len(products) >= len(free) + 2 + 5, (
            "the points' projections, and q·k, the pair bias, o, o_points, o_pair"
        )
