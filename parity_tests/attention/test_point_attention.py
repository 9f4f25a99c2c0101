"""The parameter-free core on plain arrays, for users with their own projections."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from ipa_bridge import oracle
from ipa_bridge.config import Implementation
from ipa_bridge.weights.tensors import numpy_array, torch_tensor
from ipa_parity.attention.cases import CATALOGUE
from ipa_parity.report import compare

NAMES = ("q", "k", "v", "q_points", "k_points", "v_points", "pair")


def package(framework):
    if framework == "jax":
        jax = pytest.importorskip("jax")
        pytest.importorskip("haiku")
        import ipa_jax

        return ipa_jax, jax.numpy.asarray, np.asarray
    pytest.importorskip("torch")
    import ipa_torch

    return ipa_torch, torch_tensor, numpy_array


def arguments(case):
    """The oracle's own projections of a case, points in the global frame."""
    arrays = {name: x.astype(np.float64) for name, x in case.weights.arrays.items()}
    q, k, v, *local = oracle._project(arrays, case.config, case.single)
    points = [
        np.einsum("...nxy,...nhpy->...nhpx", case.rotation, x) + case.translation[..., None, None, :] for x in local
    ]
    options = {"point_weights": np.log1p(np.exp(arrays["trainable_point_weights"])), "mask": case.mask}
    if case.pair is not None:
        options["pair_bias_weight"] = arrays["attention_2d/weights"]
    return dict(zip(NAMES, (q, k, v, *points, case.pair), strict=True)), options


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("name", ["monomer", "batch", "batch-of-batches", "no-pair"])
def test_core_is_the_oracles(name, framework):
    ipa, array, numpy = package(framework)
    case = CATALOGUE[name]()
    arrays, options = arguments(case)
    options.setdefault("pair_bias_weight", None)
    arrays, options = ({k: None if x is None else array(x) for k, x in d.items()} for d in (arrays, options))
    o, o_points, o_pair, attention = ipa.point_attention(*arrays.values(), **options, return_attention=True)
    expected = oracle.invariant_point_attention(
        case.weights.arrays, case.config, case.single, case.pair, case.rotation, case.translation, case.mask
    )
    local = np.einsum("...nyx,...nhpy->...nhpx", case.rotation, numpy(o_points) - case.translation[..., None, None, :])
    stages = {"o": (numpy(o), expected.o), "points": (local, expected.o_points)}
    stages["attention"] = (numpy(attention), expected.attention)
    if case.pair is None:
        assert o_pair is None
    else:
        stages["o_pair"] = (numpy(o_pair), expected.o_pair)
    for stage, (actual, wanted) in stages.items():
        row = compare(actual, wanted, case=name, stage=stage, dtype="float64", subject=framework, reference="oracle")
        assert row.passed, str(row)


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_outputs_come_in_the_values_dtypes(framework):
    """Scalars and pair may be in half precision beside float32 points; the core computes in float32."""
    ipa, array, _ = package(framework)
    arrays, options = arguments(CATALOGUE["monomer"]())
    half = np.dtype("bfloat16")
    arrays = {k: array(x.astype(np.float32 if "points" in k else half)) for k, x in arrays.items()}
    options = {k: array(x if x.dtype == bool else x.astype(half)) for k, x in options.items()}
    o, o_points, o_pair, attention = ipa.point_attention(*arrays.values(), **options, return_attention=True)
    dtypes = [str(x.dtype).removeprefix("torch.") for x in (o, o_points, o_pair, attention)]
    assert dtypes == ["bfloat16", "float32", "bfloat16", "float32"]
    assert len(ipa.point_attention(*arrays.values(), **options)) == 3


@pytest.mark.parametrize("implementation", get_args(Implementation))
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_the_mask_is_a_constant(framework, implementation, request):
    """A float mask has no gradient, even if it is so close to 1 that all keys get attention."""
    ipa, array, numpy = package(framework)
    if implementation == "fused":
        request.getfixturevalue("interpreted")
        if framework == "torch":
            pytest.importorskip("triton", minversion="3.7")
    rng = np.random.default_rng(0)
    shapes = [(1, 4, 2, 3)] * 3 + [(1, 4, 2, 2, 3)] * 3 + [(1, 4, 4, 32), (32, 2), (2,), (1, 4)]
    *arrays, bias, weights, mask = (rng.random(shape, "float32") for shape in shapes)
    mask = np.float32(1) - np.float32(2e-5) * mask
    q, *others = map(array, arrays)
    options = {"pair_bias_weight": array(bias), "point_weights": array(weights), "implementation": implementation}

    def scalar(q, mask):
        return sum((x**2).sum() for x in ipa.point_attention(q, *others, **options, mask=mask))

    if framework == "jax":
        import jax

        with jax.enable_x64(False):
            to_q, to_mask = jax.grad(scalar, (0, 1))(q, array(mask))
    else:
        import torch

        leaves = [q.requires_grad_(), array(mask).requires_grad_()]
        to_q, to_mask = torch.autograd.grad(scalar(*leaves), leaves, allow_unused=True, materialize_grads=True)
    assert np.abs(numpy(to_q)).max() > 0
    assert (numpy(to_mask) == 0).all()
