"""IPA depends only on relative frames: common motions change nothing, mirror images do."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipa_bridge.config import IPAConfig
from ipa_bridge.proteins.frames import idealised_peptide, random_frames
from ipa_parity.attention.cases import CATALOGUE, ODD, ODD_MULTIMER, ODD_NO_PAIR, Case, make_case
from ipa_parity.attention.stages import RUNNERS
from ipa_parity.report import compare

MIRROR = np.diag([-1.0, 1.0, 1.0])


@pytest.fixture(scope="module", params=RUNNERS)
def run_stages(request):
    pytest.importorskip(request.param)
    return partial(RUNNERS[request.param], gradients=False)


@pytest.fixture(scope="module")
def run(run_stages):
    return lambda case: run_stages(case)["out"]


def judge(actual, expected, dtype, conditioning=1.0):
    return compare(
        actual,
        expected,
        case="moved",
        stage="out",
        dtype=dtype,
        subject="moved",
        reference="still",
        conditioning=conditioning,
    )


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), config=st.sampled_from([ODD, ODD_MULTIMER, ODD_NO_PAIR]))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_motion_of_the_whole_changes_nothing(run, dtype, seed, config):
    """Rotation and translation by 10 units; the inputs' own rounding grows with the distance moved."""
    case = make_case("still", config, (9,), seed=seed % 1000)
    turn, shift = random_frames(np.random.default_rng(seed), (), spread=10.0)
    moved = replace(case, rotation=turn @ case.rotation, translation=case.translation @ turn.T + shift)
    size = 1 + np.abs(moved.translation).max() / np.abs(case.translation).max()
    row = judge(run(moved.astype(dtype)), run(case.astype(dtype)), dtype, conditioning=size)
    assert row.passed, str(row)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_residues_in_another_order_give_their_rows_in_that_order(run, dtype):
    case = CATALOGUE["monomer"]().astype(dtype)
    order = np.random.default_rng(0).permutation(len(case.single))
    fields = ("single", "rotation", "translation", "mask", "cotangent")
    shuffled = replace(
        case, **{field: getattr(case, field)[order] for field in fields}, pair=case.pair[order][:, order]
    )
    row = judge(run(shuffled), run(case)[order], dtype)
    assert row.passed, str(row)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_padding_changes_no_valid_row(run, dtype):
    case, padded = (make_case("", ODD, (n,)).astype(dtype) for n in (7, 11))
    kept = slice(0, 7)
    padded = replace(padded, **{field: getattr(padded, field).copy() for field in ("single", "pair", "mask")})
    padded.mask[:] = False
    for field in ("single", "rotation", "translation", "mask"):
        getattr(padded, field)[kept] = getattr(case, field)
    padded.pair[kept, kept] = case.pair
    row = judge(run(replace(padded, weights=case.weights))[kept][case.mask], run(case)[case.mask], dtype)
    assert row.passed, str(row)


def mirrored_coordinates(case: Case) -> Case:
    """Frames of the mirrored atoms: by Alg. 21, R → M·R·diag(1, 1, −1), t → M·t.

    The frame's third axis is a cross product, which a mirror inverts.
    """
    flip = np.diag([1.0, 1.0, -1.0])
    return replace(case, rotation=MIRROR @ case.rotation @ flip, translation=case.translation @ MIRROR)


def mirrored_frames(case: Case) -> Case:
    """R → M·R, t → M·t: an isometry, but no longer with rotations."""
    return replace(case, rotation=MIRROR @ case.rotation, translation=case.translation @ MIRROR)


@pytest.mark.parametrize("structure", [None, idealised_peptide()], ids=["random frames", "peptide"])
def test_mirror_images_give_different_outputs(run, structure):
    """A protein's mirror image has other frames relative to each other: the output differs by more than rounding."""
    case = make_case("", IPAConfig.alphafold2(), (20,), structure=structure)
    assert (np.linalg.det(mirrored_coordinates(case).rotation) > 0).all()
    row = judge(run(mirrored_coordinates(case)), run(case), "float64")
    assert row.error > 1e12


def test_only_handedness_of_frames_distinguishes_them(run):
    """IPA uses only distances and inner products, so reflecting the frames themselves changes nothing."""
    case = make_case("", ODD, (9,))
    row = judge(run(mirrored_frames(case)), run(case), "float64")
    assert row.passed, str(row)


def test_attention_of_points_in_the_frames_planes_is_blind_to_mirror_images(run_stages):
    """Query and key points without z do not use the inverted third axis; the values' z still shows it."""
    case = make_case("", ODD_MULTIMER, (9,))
    arrays = dict(case.weights.arrays)
    for name in (name for name in arrays if name.startswith(("q_point", "k_point"))):
        x = arrays[name].copy()
        x.reshape(*x.shape[:-1], 3, -1)[..., 2, :] = 0
        arrays[name] = x
    case = replace(case, weights=replace(case.weights, arrays=arrays))
    mirrored, still = run_stages(mirrored_coordinates(case)), run_stages(case)
    assert judge(mirrored["attention"], still["attention"], "float64").passed
    assert judge(mirrored["norms"], still["norms"], "float64").error > 1e12
