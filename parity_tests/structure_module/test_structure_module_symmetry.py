"""The structure module moves with its start frames; padding, frozen residues, batches and untied layers work."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structure_module_cases import (
    CONFIGS,
    UNTIED_MODULE,
    assert_same,
    batch_of,
    odd_case,
    start_of,
)

from ipa_bridge.proteins.frames import random_frames
from ipa_bridge.weights import Weights


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(["odd", "odd multimer"]))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_predictions_move_with_the_start_frames(framework, dtype, seed, name):
    """Atoms and frames move along, angles and activations stay; the inputs' rounding grows with the distance."""
    case = odd_case(name)
    start = start_of(case)
    turn, shift = random_frames(np.random.default_rng(seed), (), spread=30.0)
    moved = (turn @ start[0], start[1] @ turn.T + shift)
    as_dtype = lambda frames: tuple(x.astype(dtype) for x in frames)  # noqa: E731
    still = framework.run_structure_module(case.astype(dtype), rigids=as_dtype(start))
    expected = {stage: move(stage, x, turn, shift) for stage, x in still.items()}
    actual = framework.run_structure_module(case.astype(dtype), rigids=as_dtype(moved))
    size = 1 + np.abs(moved[1]).max() / np.abs(start[1]).max()
    assert_same(actual, expected, dtype, conditioning=4 * size)


def move(stage, x, turn, shift):
    if stage.startswith(("rotation", "group_rotation")):
        return turn @ x
    if stage.startswith(("translation", "group_translation")):
        return x @ turn.T + shift
    if stage.startswith("atom14"):
        return np.where((x == 0).all(-1, keepdims=True), 0, x @ turn.T + shift)
    return x


@pytest.mark.covering
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_no_valid_residue(framework, name, dtype):
    case, rng, more = odd_case(name, dtype), np.random.default_rng(1), 5
    number = len(case.mask)

    def pad(x, axes=1):
        junk = 10 * rng.standard_normal([n + more if i < axes else n for i, n in enumerate(x.shape)])
        junk = (junk * 2).astype(x.dtype) if x.dtype != bool else np.zeros(junk.shape, bool)
        junk[tuple(slice(number) for _ in range(axes))] = x
        return junk

    padded = replace(
        case,
        single=pad(case.single),
        pair=pad(case.pair, 2),
        mask=pad(case.mask),
        aatype=np.resize(case.aatype, number + more),
    )
    actual, expected = framework.run_structure_module(padded), framework.run_structure_module(case)
    assert_same({k: x[:number] for k, x in actual.items()}, expected, dtype, rows=case.mask)


@pytest.mark.parametrize("name", ["odd", "odd multimer"])
def test_frozen_residues_keep_their_frames(framework, name):
    case = odd_case(name)
    start = start_of(case)
    frozen = np.arange(len(case.mask)) % 3 == 0
    arrays = framework.run_structure_module(case, rigids=start, update_mask=~frozen)
    for layer in range(1, 4):
        assert_close(arrays[f"rotation/layer {layer}"][frozen], start[0][frozen])
        assert_close(arrays[f"translation/layer {layer}"][frozen], start[1][frozen])
    assert (np.abs(arrays["translation/layer 1"] - start[1]).max(-1)[~frozen] > 1e-3).all()
    of_floats = framework.run_structure_module(case, rigids=start, update_mask=(~frozen).astype(np.float32))
    assert_same(of_floats, arrays)


def test_without_frozen_residues_all_frames_move(framework):
    case = odd_case()
    start, everywhere = start_of(case), np.ones(len(case.mask), bool)
    assert_same(
        framework.run_structure_module(case, rigids=start, update_mask=everywhere),
        framework.run_structure_module(case, rigids=start),
    )


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.covering
@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_is_its_members(framework, name):
    first = odd_case(name)
    other = replace(
        first, single=first.single[::-1], pair=first.pair[::-1], aatype=first.aatype[::-1], mask=first.mask[::-1]
    )
    each = [framework.run_structure_module(x, rigids=start_of(x)) for x in (first, other)]
    batch = batch_of(first, other)
    assert_same(
        framework.run_structure_module(batch, rigids=start_of(batch)),
        {k: np.stack([x[k] for x in each]) for k in each[0]},
    )
    batches = batch_of(batch, batch)
    both = framework.run_structure_module(batches, rigids=start_of(batches))
    assert both["atom14/layer 1"].shape == (2, 2, len(first.mask), 14, 3)
    assert_same({k: x[1] for k, x in both.items()}, {k: np.stack([x[k] for x in each]) for k in each[0]})


def test_start_frames_are_alphafolds_where_none_are_given(framework):
    case = odd_case()
    number = len(case.mask)
    origin = np.broadcast_to(np.eye(3), (number, 3, 3)).copy(), np.zeros((number, 3))
    assert_same(framework.run_structure_module(case), framework.run_structure_module(case, rigids=origin))


def test_untied_layers_have_their_own_weights(framework):
    """With equal weights in all layers they equal tied layers; new weights in the last layer change only the last."""
    tied, config = odd_case(), UNTIED_MODULE
    arrays = dict(tied.weights.arrays)
    for name, x in tied.weights.arrays.items():
        if name.startswith("fold_iteration/"):
            arrays |= {name.replace("fold_iteration/", f"fold_iteration_{layer}/"): x for layer in (1, 2)}
    same = replace(tied, weights=Weights(arrays, config))
    expected = framework.run_structure_module(tied)
    assert_same(framework.run_structure_module(same), expected)
    changed = {n: x * 1.5 if n.startswith("fold_iteration_2/transition") else x for n, x in arrays.items()}
    actual = framework.run_structure_module(replace(tied, weights=Weights(changed, config)))
    assert_close(actual["atom14/layer 2"], expected["atom14/layer 2"])
    assert np.abs(actual["atom14/layer 3"] - expected["atom14/layer 3"]).max() > 1e-3
