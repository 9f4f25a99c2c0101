"""Derivatives, dtypes, masks and degenerate inputs of the torch IPA."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

import numpy as np
from torch_module_cases import arguments, judge, model

import ipa_torch
from ipa_bridge.config import (
    IPATransformerConfig,
)
from ipa_bridge.weights.tensors import torch_tensor
from ipa_parity.attention.cases import CATALOGUE, ODD, ODD_MULTIMER, ODD_NO_PAIR, make_case


def test_func_vmap_and_grad():
    case = CATALOGUE["batch"]()
    module, (single, pair, rigids, mask) = model(case), arguments(case)
    state = dict(module.named_parameters())
    call = lambda p, *xs: torch.func.functional_call(module, p, xs)  # noqa: E731
    expected = module(single, pair, rigids, mask)
    judge(torch.func.vmap(call, (None, 0, 0, 0, 0))(state, single, pair, rigids, mask), expected)

    loss = lambda s, *xs: call(state, s, *xs).square().sum()  # noqa: E731
    leaf = single.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(loss(leaf, pair, rigids, mask), leaf)
    judge(torch.func.grad(loss)(single, pair, rigids, mask), by_autograd, "gradient")
    judge(torch.func.vmap(torch.func.grad(loss))(single, pair, rigids, mask), by_autograd, "gradient")


def test_forward_mode_agrees_with_reverse_mode():
    case = CATALOGUE["monomer"]()
    module, (single, *inputs) = model(case, "float64"), arguments(case, "float64")
    direction = torch.from_numpy(np.random.default_rng(0).standard_normal(single.shape))
    loss = lambda s: module(s, *inputs).square().sum()  # noqa: E731
    _, forward = torch.func.jvp(loss, (single,), (direction,))
    judge(forward[None], (torch.func.grad(loss)(single) * direction).sum()[None], "gradient", "float64")


def test_second_derivatives_pass_gradgradcheck():
    case = make_case("", replace(ODD, num_channel=3, num_head=2, pair_channel=2), (3,))
    module, (single, *inputs) = model(case, "float64"), arguments(case, "float64")
    assert torch.autograd.gradgradcheck(lambda s: module(s, *inputs), single.requires_grad_())


def test_inference_mode():
    case = CATALOGUE["monomer"]()
    module, inputs = model(case), arguments(case)
    with torch.inference_mode():
        out = module(*inputs)
    judge(out, module(*inputs))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_output_has_the_inputs_dtype_and_attention_at_least_float32(dtype):
    case = CATALOGUE["monomer"]()
    module, inputs = model(case, dtype), arguments(case, dtype)
    out, attention = module(*inputs, return_attention=True)
    assert out.dtype == getattr(torch, dtype)
    assert attention.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    judge(attention.sum(-1), torch.ones(attention.shape[:-1]), "attention", "float32")


def test_half_precision_activations_with_float32_parameters():
    case = CATALOGUE["spread-50"]()
    module, (single, pair, rigids, mask) = model(case), arguments(case, "bfloat16")
    out = module(single, pair, rigids, mask)
    exact = module(single.float(), pair.float(), rigids.astype(torch.float32), mask)
    assert out.dtype == torch.bfloat16
    judge(out, exact, "out", "bfloat16")


@pytest.mark.parametrize("activations", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("frames", ["float16", "float32", "float64"])
def test_frames_do_not_decide_the_dtype(activations, frames):
    """The activations do, at least float32: a protein's frames come in float64."""
    case = CATALOGUE["monomer"]()
    module, (single, pair, rigids, mask) = model(case, activations), arguments(case, activations)
    rigids = rigids.astype(getattr(torch, frames))
    seen = []
    module.output_projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    out, attention = module(single, pair, rigids, mask, return_attention=True)
    at_least_float32 = torch.float64 if activations == "float64" else torch.float32
    assert (out.dtype, attention.dtype, *seen) == (single.dtype, at_least_float32, at_least_float32)


def test_far_frames_keep_their_bits_until_they_are_centred():
    case = CATALOGUE["monomer"]()
    module, (single, pair, rigids, mask) = model(case), arguments(case)
    near = rigids.astype(torch.float64)
    far = near._replace(translation=near.translation + 1e6)
    judge(module(single, pair, far, mask), module(single, pair, near, mask))


def test_frames_of_a_transformer_have_its_activations_dtype():
    config = IPATransformerConfig.lucidrains(8, depth=1, heads=2, require_pairwise_repr=False)
    act, rigids = torch.randn(5, 8), ipa_torch.Rigid.random((5,), dtype=torch.float64)
    moved = ipa_torch.IPATransformer(config)(act, None, rigids).rigids
    assert {x.dtype for x in moved} == {torch.float32}


@pytest.mark.parametrize("name", ["alphafold2", "spread-50", "offset-1000", "multimer"])
def test_autocast_keeps_geometry_in_float32(name):
    """CPU autocast runs float32 matrix products in bfloat16, which would ruin coordinates of ±50."""
    case = CATALOGUE[name]()
    module, inputs = model(case), arguments(case)
    cotangent, parameters = torch_tensor(case.cotangent).float(), list(module.parameters())
    exact, exact_attention = module(*inputs, return_attention=True)
    exact_gradients = torch.autograd.grad((exact * cotangent).sum(), parameters)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, attention = module(*inputs, return_attention=True)
        gradients = torch.autograd.grad((module(*inputs) * cotangent).sum(), parameters)
    assert out.dtype == torch.float32
    assert attention.dtype == torch.float32
    judge(out, exact, "out", "bfloat16")
    judge(attention, exact_attention, "attention", "bfloat16")
    for actual, expected in zip(gradients, exact_gradients, strict=True):
        assert actual.isfinite().all()
        if (
            expected.any() and name != "spread-50"
        ):  # the gradient of attention_2d's bias is zero; far apart, bits of the queries decide
            judge(actual, expected, "gradient", "bfloat16")


def test_core_ignores_autocast():
    case = CATALOGUE["spread-50"]()
    module, (single, pair, rigids, mask) = model(case), arguments(case)
    pair_bias_weight, point_weights = module.logit_weights()
    projections = module.project(single, rigids)

    def attend():
        return ipa_torch.point_attention(
            *projections, pair, pair_bias_weight=pair_bias_weight, point_weights=point_weights, mask=mask
        )

    expected = attend()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = attend()
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.float32, torch.float16])
def test_masks_of_any_dtype(kind):
    case = CATALOGUE["monomer"]()
    module, (*inputs, mask) = model(case), arguments(case)
    assert torch.equal(module(*inputs, mask.to(kind)), module(*inputs, mask))


def test_masked_residues_are_ignored_by_valid_ones():
    case = CATALOGUE["monomer"]()
    module, (single, pair, rigids, mask) = model(case), arguments(case)
    hidden = (~mask[:, None]).float()
    moved = ipa_torch.Rigid(rigids.rotation, rigids.translation + 5 * hidden)
    changed, out = module(single + 3 * hidden, pair, moved, mask), module(single, pair, rigids, mask)
    judge(changed[mask], out[mask])
    assert ((changed - out).abs()[~mask] > 1e-3).any()


@pytest.mark.parametrize("config", [ODD, ODD_MULTIMER, ODD_NO_PAIR])
@pytest.mark.parametrize("residues", [0, 1])
def test_no_residue_and_one_residue(config, residues):
    case = make_case("", config, (residues,))
    module, (single, *inputs) = model(case), arguments(case)
    out = module(single.requires_grad_(), *inputs)
    (gradient,) = torch.autograd.grad(out.sum(), single)
    assert out.shape == gradient.shape == (residues, config.num_channel)
    assert out.isfinite().all()
    assert gradient.isfinite().all()


def test_everything_masked_is_finite():
    case = CATALOGUE["monomer"]()
    module, (single, pair, rigids, mask) = model(case), arguments(case)
    leaves = [x.requires_grad_() for x in (single, pair, *rigids)]
    out = module(single, pair, rigids, torch.zeros_like(mask))
    assert out.isfinite().all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), [*leaves, *module.parameters()]))


def test_coincident_frames_have_finite_gradients():
    """Every local point at its frame's origin: the norms' gradients are finite in both forms."""
    for config in (ODD, ODD_MULTIMER):
        case = make_case("", config, (5,))
        module, (single, pair, rigids, mask) = model(case), arguments(case)
        still = ipa_torch.Rigid(rigids.rotation, torch.zeros_like(rigids.translation).requires_grad_())
        for name, x in module.named_parameters():
            if "point" in name:
                torch.nn.init.zeros_(x)
        out = module(single.requires_grad_(), pair, still, mask)
        assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), [single, still.translation]))


def test_every_parameter_has_a_gradient():
    """A missing gradient breaks DistributedDataParallel; that of the pair bias's own bias is exactly zero."""
    case = CATALOGUE["multimer"]()
    module = model(case)
    module(*arguments(case)).sum().backward()
    assert all(x.grad is not None for x in module.parameters())
    assert (module.attention_2d.bias.grad == 0).all()


def test_nan_is_never_hidden():
    case = CATALOGUE["monomer"]()
    single, *inputs = arguments(case)
    single[0, 0] = torch.nan
    assert model(case)(single, *inputs)[0].isnan().all()
