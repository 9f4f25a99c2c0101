"""Keys that a mask hides have no weight, and distances and lengths of zero have gradients of zero."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from fused_cases import arrays_of, run, without_triton

from ipa_bridge.config import Implementation
from ipa_parity.attention.cases import ODD, ODD_PAIR_VALUES, make_case
from ipa_parity.report import compare

SHAPE = (2, 7)


@pytest.fixture(params=get_args(Implementation))
def implementation(request, framework):
    """Each implementation in turn; GPU kernels are interpreted."""
    if request.param == "fused":
        request.getfixturevalue("interpreted")
        if framework.name == "torch" and without_triton():
            pytest.skip(without_triton())
    return request.param


def problem():
    """Inputs in float32 that all implementations take, without residue mask; the first two residues coincide."""
    arrays, cotangents = arrays_of(SHAPE, 3, 32, mask=False)
    for name in ("q_points", "k_points"):
        arrays[name][:, :2] = arrays["q_points"][:, :1]
    return arrays, cotangents


def masks(shape=SHAPE):
    """Masks of keys, and of pairs; the first example's second query may attend to none."""
    rng = np.random.default_rng(0)
    keys, pairs = rng.random(shape) > 0.3, rng.random((*shape, shape[-1])) > 0.3
    pairs[0, 1] = False
    return keys, pairs


def attend(framework, arrays, cotangents, implementation, **options):
    """Outputs and gradients; skips what PyTorch's kernels refuse."""
    inputs, options = (framework, arrays, cotangents), {"implementation": implementation, **options}
    masked, unsquared = "pair_mask" in options, options.get("distance_form") == "unsquared"
    if implementation == "fused" and framework.name == "torch" and (masked or unsquared):
        with pytest.raises(NotImplementedError, match="implementation='streamed' has no such limit"):
            run(*inputs, **options)
        pytest.skip("the kernels in PyTorch have neither pair masks nor unsquared distances")
    return run(*inputs, **options)


# --- Distances and lengths of zero


def test_distances_of_zero_have_no_gradient(framework, implementation):
    """All points coincide: unsquared distances without ε then have gradients of exactly zero, and not NaN."""
    arrays, cotangents = problem()
    for name in ("q_points", "k_points"):
        arrays[name] = np.ones_like(arrays[name])
    outputs, gradients = attend(framework, arrays, cotangents, implementation, distance_form="unsquared")
    assert all(np.isfinite(x).all() for x in (*outputs, *gradients.values()))
    assert not any(gradients[name].any() for name in ("q_points", "k_points", "point_weights"))
    assert all(gradients[name].any() for name in ("q", "k", "v_points", "pair"))


@pytest.mark.covering("implementation")
@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
def test_some_distances_of_zero(framework, implementation, epsilon):
    """Where points coincide, the gradient is zero; elsewhere it is as before. Judged by ε → 0 in float64."""
    arrays, cotangents = problem()
    options = {"distance_form": "unsquared", "distance_epsilon": epsilon}
    outputs, gradients = attend(framework, arrays, cotangents, implementation, **options)
    wide = {name: None if x is None else x.astype("float64") for name, x in arrays.items()}
    tiny = {**options, "distance_epsilon": epsilon or 1e-30}
    exact, of_exact = run(framework, wide, cotangents, implementation="reference", **tiny)
    names = {"case": "unsquared", "dtype": "float32", "subject": implementation, "reference": "float64"}
    rows = [compare(x, e, stage="out", **names) for x, e in zip(outputs, exact, strict=True)]
    rows += [compare(gradients[name], e, stage=f"gradient/{name}", **names) for name, e in of_exact.items()]
    failed = [str(row) for row in rows if not row.passed]
    assert not failed, "\n".join(failed)


@pytest.mark.covering
@pytest.mark.parametrize("still", [True, False])
def test_lengths_of_zero_have_no_gradient(framework, still):
    """Without an ε in lengths, value points at their frame's origin give finite gradients: zero through lengths."""
    case = make_case("lengths", ODD_PAIR_VALUES, SHAPE)
    points = {name: 0 * x if "point_projection" in name else x for name, x in case.weights.arrays.items()}
    rest = points["output_projection/weights"].copy()
    c = case.config
    before = c.num_head * (c.num_scalar_v + 3 * c.num_point_v)
    rest[:before], rest[before + c.num_head * c.num_point_v :] = 0, 0  # reads lengths alone
    arrays = points | {"output_projection/weights": rest}
    case = replace(case, weights=replace(case.weights, arrays=arrays), translation=(not still) * case.translation)
    pair, rotation, mask = map(framework.array, (case.pair, case.rotation, case.mask))

    def out(single, translation):
        return framework.ipa(case, single, pair, framework.Rigid(rotation, translation), mask)

    to_single, to_translation = framework.gradients_of_sum(out, case.single, case.translation)
    assert np.isfinite(to_single).all()
    assert np.isfinite(to_translation).all()
    assert to_single.any() == to_translation.any() == (not still)


# --- Hidden keys


def hidden(framework, kinds):
    keys, pairs = masks()
    seen = np.ones((*SHAPE, SHAPE[-1]), bool)
    seen &= keys[:, None] if "key_mask" in kinds else True
    seen &= pairs if "pair_mask" in kinds else True
    given = {"key_mask": keys, "pair_mask": pairs}
    return {name: framework.array(given[name]) for name in kinds}, seen


KINDS = [("key_mask",), ("pair_mask",), ("key_mask", "pair_mask")]


@pytest.mark.covering("framework")
@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
@pytest.mark.parametrize("which", ["reference", "streamed"])
def test_hidden_keys_have_no_weight(framework, which, kinds):
    """Their weights are exactly zero, and the others sum to 1, or to 0 where a query has no key."""
    arrays, cotangents = problem()
    options, seen = hidden(framework, kinds)
    (*_, attention), _ = run(framework, arrays, cotangents, implementation=which, return_attention=True, **options)
    expected = np.broadcast_to(seen[:, None], attention.shape)
    assert np.array_equal(attention > 0, expected)
    assert np.allclose(attention.sum(-1), seen.any(-1)[:, None], rtol=1e-6)


@pytest.mark.covering("implementation")
@pytest.mark.parametrize("distance_form", ["squared", "unsquared"])
@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
def test_hidden_keys_are_not_read(framework, implementation, kinds, distance_form):
    """Other values there leave every bit of the outputs, and get gradients of exactly zero. Blind queries get zeros."""
    arrays, cotangents = problem()
    options, seen = hidden(framework, kinds)
    options["distance_form"] = distance_form
    outputs, gradients = attend(framework, arrays, cotangents, implementation, **options)
    blind = ~seen.any(-1)
    assert blind.any() == ("pair_mask" in kinds)
    assert not any(x[blind].any() for x in outputs)
    assert not any(gradients[name][blind].any() for name in ("q", "q_points"))
    assert not gradients["pair"][~seen].any()
    never = ~seen.any(-2)
    assert never.any() == ("key_mask" in kinds)
    for name in ("k", "v", "k_points", "v_points"):
        assert not gradients[name][never].any()
    other = dict(arrays)
    for name in ("k", "v", "k_points", "v_points"):
        other[name] = np.where(never.reshape(*SHAPE, *[1] * (arrays[name].ndim - 2)), 3 + arrays[name], arrays[name])
    other["pair"] = np.where(seen[..., None], arrays["pair"], 5 - arrays["pair"]).astype(arrays["pair"].dtype)
    again, _ = attend(framework, other, cotangents, implementation, **options)
    assert all(np.array_equal(x, y) for x, y in zip(outputs, again, strict=True))


@pytest.mark.covering
def test_a_mask_of_ones_hides_nothing(framework, implementation):
    arrays, cotangents = problem()
    ones = framework.array(np.ones(SHAPE))
    plain, masked = (
        run(framework, arrays, cotangents, implementation=implementation, **options)[0]
        for options in ({}, {"key_mask": ones})
    )
    for x, y in zip(masked, plain, strict=True):
        row = compare(x, y, case="ones", stage="out", dtype="float32", subject=implementation, reference="no mask")
        assert row.passed, str(row)


@pytest.mark.covering
@pytest.mark.parametrize("config", [ODD, ODD_PAIR_VALUES])
def test_a_module_gives_its_bias_to_blind_queries(framework, config):
    """The features of a query without keys are zeros, lengths with an ε aside; no gradient passes through them."""
    config = replace(config, norm_epsilon=0.0)
    case = make_case("blind", config, SHAPE)
    keys = np.ones(SHAPE, bool)
    keys[0] = False
    rigids = framework.Rigid(*map(framework.array, (case.rotation, case.translation)))
    pair, keys = map(framework.array, (case.pair, keys))
    module = attention(framework, case)

    def out(single):
        return module(single, pair, rigids, None, key_mask=keys)

    blind, seeing = framework.numpy(out(framework.array(case.single)))
    assert np.array_equal(blind, np.broadcast_to(case.weights.arrays["output_projection/bias"], blind.shape))
    assert not np.array_equal(seeing, blind)
    (to_single,) = framework.gradients_of_sum(out, case.single)
    assert not to_single[0].any()
    assert np.isfinite(to_single).all()


def attention(framework, case):
    """Our module with a case's weights, as a function."""
    if framework.name == "jax":
        params = framework.jax.tree.map(framework.array, case.weights.to_haiku())
        apply = framework.package.transform_ipa(case.config).apply
        return lambda *inputs, **masks: apply(params, *inputs, **masks)
    module = framework.package.InvariantPointAttention(case.config).double()
    module.load_state_dict(case.weights.to_torch())
    return module
