"""Blocks and transformers compute the same in both frameworks and in the published package."""

from __future__ import annotations

import sys
import types
import warnings
from dataclasses import replace

import numpy as np
import pytest
from transformer_cases import (
    BLOCKS,
    FRAMEWORKS,
    RESIDUES,
    TRANSFORMERS,
    assert_close,
    draw,
    framework,
    run,
)

from ipa_bridge.config import IPABlockConfig, IPATransformerConfig
from ipa_bridge.weights import Weights, semantics
from ipa_bridge.weights.dialects import find_dialect
from ipa_bridge.weights.tensors import torch_tensor
from ipa_parity.frameworks import installed_frameworks


@pytest.mark.parametrize(
    ("name", "shape"),
    [*((name, (RESIDUES,)) for name in [*BLOCKS, *TRANSFORMERS]), ("post-norm", (2, 7)), ("plain", (2, 7))],
)
def test_the_twins_agree_outputs_and_gradients(name, shape):
    """The comparison is in float64, where no ReLU flips."""
    if len(installed_frameworks()) < 2:
        pytest.skip("one of the frameworks is not installed")
    config = (BLOCKS | TRANSFORMERS)[name]
    inputs = draw(config, shape)
    jax, torch = (run(each, config, inputs, gradients=True) for each in FRAMEWORKS)
    assert_close(jax, torch, inputs["mask"], "float64")


@pytest.mark.parametrize("each", FRAMEWORKS)
@pytest.mark.parametrize("name", [*BLOCKS, *TRANSFORMERS])
def test_float32_is_float64_rounded(name, each):
    config = (BLOCKS | TRANSFORMERS)[name]
    inputs = draw(config, dtype="float32")
    wide = {x: y.astype(np.float64) if getattr(y, "dtype", None) == np.float32 else y for x, y in inputs.items()}
    wide["weights"] = inputs["weights"].astype(np.float64)
    actual, expected = (run(framework(each), config, x) for x in (inputs, wide))
    assert {x.dtype for x in actual.values()} == {np.dtype(np.float32)}
    assert_close(actual, expected, inputs["mask"], "float32")


@pytest.mark.parametrize("each", FRAMEWORKS)
@pytest.mark.parametrize("name", [*BLOCKS, *TRANSFORMERS])
def test_they_agree_with_numpy_on_the_same_parameters(name, each):
    """`semantics` uses neither framework, and has its own rigid motions."""
    config = (BLOCKS | TRANSFORMERS)[name]
    inputs = draw(config)
    p = {x: y.astype(np.float64) for x, y in inputs["weights"].arrays.items()}
    arrays = [inputs[x] for x in ("single", "pair", "rotation", "translation", "mask")]
    if isinstance(config, IPATransformerConfig):
        act, rotation, translation, points = semantics.transformer("ipa_jax", p, config, *arrays)
        expected = {"act": act, "rotation": rotation, "translation": translation}
        expected |= {} if points is None else {"points": points}
    else:
        expected = {"act": semantics.block("ipa_jax", p, config, *arrays)}
    assert_close(run(framework(each), config, inputs), expected, inputs["mask"], "float64")


# --- The published ones


@pytest.fixture
def package(monkeypatch):
    """`invariant-point-attention`, with two functions of pytorch3d rewritten from their documentation."""
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pytest.importorskip("invariant_point_attention")

    def quaternion_multiply(a, b):
        (aw, ax, ay, az), (bw, bx, by, bz) = a.unbind(-1), b.unbind(-1)
        product = [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ]
        product = torch.stack(product, -1)
        return torch.where(product[..., :1] < 0, -product, product)

    def quaternion_to_matrix(quaternions):
        import ipa_torch

        return ipa_torch.Rigid.from_quaternion(quaternions, torch.zeros_like(quaternions[..., 1:])).rotation

    transforms = types.ModuleType("pytorch3d.transforms")
    transforms.quaternion_multiply, transforms.quaternion_to_matrix = quaternion_multiply, quaternion_to_matrix
    monkeypatch.setitem(sys.modules, "pytorch3d", types.ModuleType("pytorch3d"))
    monkeypatch.setitem(sys.modules, "pytorch3d.transforms", transforms)
    return found


@pytest.mark.covering("each")
@pytest.mark.parametrize("each", FRAMEWORKS)
@pytest.mark.parametrize("post_norm", [True, False])
@pytest.mark.parametrize("paired", [True, False])
def test_their_block_is_ours(package, each, post_norm, paired):
    """Each block loads the other's parameters strictly and bit for bit, and outputs are the same."""
    options = {"heads": 3, "ff_mult": 2, "ff_num_layers": 3, "post_norm": post_norm, "require_pairwise_repr": paired}
    config = IPABlockConfig.lucidrains(16, **options)
    inputs = draw(config, (2, RESIDUES))
    theirs = package.IPABlock(dim=16, **options).double().eval()
    theirs.load_state_dict(inputs["weights"].to_torch(dialect="lucidrains"))
    again = Weights.from_torch(theirs.state_dict(), config=config)
    assert all(again.arrays[name].tobytes() == x.tobytes() for name, x in inputs["weights"].arrays.items())
    single, pair, rotation, translation, mask = (
        None if inputs[x] is None else torch_tensor(inputs[x])
        for x in ("single", "pair", "rotation", "translation", "mask")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = theirs(single, pairwise_repr=pair, rotations=rotation.mT, translations=translation, mask=mask)
    expected = {"act": out.detach().numpy()}
    assert_close(run(framework(each), config, inputs), expected, inputs["mask"], "float64")


@pytest.mark.covering("each")
@pytest.mark.parametrize("each", FRAMEWORKS)
@pytest.mark.parametrize("predict_points", [True, False])
@pytest.mark.parametrize("detach_rotations", [True, False])
def test_their_transformer_is_ours_in_its_own_order(package, each, predict_points, detach_rotations):
    """Outputs and gradients of parameters agree. No mask is passed, because their transformer ignores it."""
    torch = pytest.importorskip("torch")
    options = {"heads": 3, "depth": 3, "num_tokens": 7, "predict_points": predict_points}
    options |= {"detach_rotations": detach_rotations}
    config = IPATransformerConfig.lucidrains(16, original_composition_order=True, **options)
    inputs = draw(config, (2, RESIDUES))
    inputs["mask"][:] = True
    rng = np.random.default_rng(5)
    quaternions = rng.standard_normal((2, RESIDUES, 4))
    quaternions /= np.linalg.norm(quaternions, axis=-1, keepdims=True)
    import ipa_torch

    started = ipa_torch.Rigid.from_quaternion(torch_tensor(quaternions), torch.zeros(2, RESIDUES, 3).double())
    inputs["rotation"] = started.rotation.mT.contiguous().numpy()  # their frames act on row vectors
    theirs = package.IPATransformer(dim=16, **options).double().eval()
    theirs.load_state_dict(inputs["weights"].to_torch(dialect="lucidrains"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = theirs(
            torch_tensor(inputs["single"]),
            translations=torch_tensor(inputs["translation"]),
            quaternions=torch_tensor(quaternions),
            pairwise_repr=torch_tensor(inputs["pair"]),
        )
    ours = run(framework(each), config, inputs)
    if predict_points:
        expected = {"points": out.detach().numpy()}
    else:
        act, translation, turned = out
        rotation = ipa_torch.Rigid.from_quaternion(turned, translation).rotation.mT
        expected = {"act": act, "rotation": rotation, "translation": translation}
        expected = {name: x.detach().numpy() for name, x in expected.items()}
    assert_close({name: ours[name] for name in expected}, expected, inputs["mask"], "float64")
    if each == "torch" and predict_points:
        (out**2).sum().backward()
        grads = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in theirs.named_parameters()}
        grads = {
            name: torch.zeros_like(dict(theirs.named_parameters())[name]) if x is None else x
            for name, x in grads.items()
        }
        theirs_by_name = Weights.from_torch(grads, config=config).arrays
        module = ipa_torch.IPATransformer(config).double()
        module.load_state_dict(inputs["weights"].to_torch())
        rigids = ipa_torch.Rigid(torch_tensor(inputs["rotation"]), torch_tensor(inputs["translation"]))
        points = module(torch_tensor(inputs["single"]), torch_tensor(inputs["pair"]), rigids).points
        (points**2).sum().backward()
        mine = Weights.from_torch({name: x.grad for name, x in module.named_parameters()}, config=config).arrays
        for name, x in theirs_by_name.items():
            scale = np.abs(x).max()
            if scale > 1e-9:  # the pair bias's own bias has none
                assert np.abs(mine[name] - x).max() <= 1e-10 * scale, name


def test_the_equivariant_order_converts_only_as_an_allowed_loss():
    config = replace(TRANSFORMERS["original order"], original_composition_order=False)
    weights = Weights.random(config)
    with pytest.raises(ValueError, match="--allow-lossy composition_order"):
        weights.to_torch(dialect="lucidrains")
    converted, _ = weights.converted(find_dialect("lucidrains"), allow_lossy=["composition_order"])
    assert converted.config.original_composition_order
    apart = [semantics.probe("ipa_jax", x.arrays, x.config) for x in (weights, converted)]
    assert semantics.distance(*apart) > 1e-3
