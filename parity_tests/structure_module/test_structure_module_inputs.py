"""Dtypes and inputs that the structure module accepts and refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from frameworks import Jax
from structure_module_cases import (
    assert_same,
    odd_case,
    start_of,
)

from ipa_parity.structure_module.stages import named_layers


@pytest.mark.covering("framework")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["odd", "odd multimer"])
def test_half_precision_keeps_frames_in_float32(framework, name, dtype):
    case = odd_case(name).astype(dtype)
    arrays = framework.run_structure_module(case) if isinstance(framework, Jax) else run_half(framework, case)
    exact = framework.run_structure_module(case.astype("float32"))
    assert arrays["atom14/layer 3"].dtype == np.float32
    assert arrays["rotation/layer 3"].dtype == np.float32
    error = np.abs(arrays["atom14/layer 3"] - exact["atom14/layer 3"])[case.mask].max()
    assert 0 < error < 0.1 * np.abs(exact["atom14/layer 3"]).max()


def run_half(framework, case):
    single, pair, aatype, mask, *_ = framework.arguments(case, None, None)
    with framework.torch.no_grad():
        output = framework.structure_module(case)(single, pair, aatype, mask)
    assert output.act.dtype == single.dtype
    output = framework.torch.utils._pytree.tree_map(lambda x: x.float().numpy(), output)
    return named_layers(output)


@pytest.mark.parametrize("name", ["odd", "untied multimer"])
def test_float32_representations_and_float64_parameters(framework, name):
    """Frames are then float64 and activations float32, as when a model is refined in float64."""
    case = odd_case(name)
    mixed = replace(case, single=case.single.astype(np.float32), pair=case.pair.astype(np.float32))
    if isinstance(framework, Jax):
        arrays = framework.run_structure_module(mixed)
    else:
        single, pair, aatype, mask, *_ = framework.arguments(mixed, None, None)
        with framework.torch.no_grad():
            output = framework.structure_module(case)(single, pair, aatype, mask)
        arrays = named_layers(framework.torch.utils._pytree.tree_map(lambda x: x.numpy(), output))
    assert {arrays[f"{field}/layer 1"].dtype.name for field in ("rotation", "translation", "atom14")} == {"float64"}
    assert arrays["act/layer 1"].dtype == np.float32
    assert_same(arrays, framework.run_structure_module(case), "float32", rows=case.mask)


def test_start_frames_do_not_decide_the_dtype(framework):
    """A protein's start frames are float64; a float32 model stays in float32."""
    case = odd_case("odd", "float32")
    rotation, translation = start_of(case)
    exact = framework.run_structure_module(case, rigids=(rotation.astype(np.float64), translation.astype(np.float64)))
    assert {x.dtype.name for x in exact.values()} == {"float32"}
    assert_same(exact, framework.run_structure_module(case, rigids=(rotation, translation)), "float32", rows=case.mask)


def test_masks_of_any_dtype(framework):
    case = odd_case()
    expected = framework.run_structure_module(case)
    for dtype in (np.int32, np.float32):
        assert_same(framework.run_structure_module(replace(case, mask=case.mask.astype(dtype))), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"single": np.zeros((4, 7))}, r"single must be \(\*batch, N, 11\), num_channel last; got \(4, 7\)"),
        ({"pair": np.zeros((3, 4, 6))}, r"pair must be"),
        ({"aatype": np.zeros(4)}, "aatype must hold integers, 0–19 or 20 for unknown; got"),
        ({"aatype": np.zeros(3, int)}, "aatype must be"),
        ({"mask": np.zeros((1, 4), bool)}, "mask must be"),
    ],
)
def test_bad_inputs_raise(framework, change, message):
    case = odd_case()
    fits = {
        "single": np.zeros((4, 11)),
        "pair": np.zeros((4, 4, 6)),
        "aatype": np.zeros(4, int),
        "mask": np.ones(4, bool),
    }
    with pytest.raises(ValueError, match=message):
        framework.run_structure_module(replace(case, **fits | change))


def test_residue_types_of_padding_may_be_anything(framework):
    """At valid residues, types out of range raise if their values can be read."""
    case = odd_case()
    assert not case.mask.all()
    unknown, padded, wrong = (
        replace(case, aatype=np.where(where, other, case.aatype))
        for where, other in ((~case.mask, 20), (~case.mask, -100), (case.mask, 21))
    )
    assert_same(framework.run_structure_module(padded), framework.run_structure_module(unknown))
    with pytest.raises(ValueError, match="aatype must be 0–19, or 20 for unknown, where a residue is valid; got 21"):
        framework.run_structure_module_eagerly(wrong)


def test_bad_start_frames_and_update_masks_raise(framework):
    case = odd_case()
    rotation, translation = start_of(case)
    with pytest.raises(ValueError, match=r"rigids\.translation must be"):
        framework.run_structure_module(case, rigids=(rotation, translation[1:]))
    with pytest.raises(ValueError, match="update_mask must be"):
        framework.run_structure_module(case, update_mask=case.mask[1:])
