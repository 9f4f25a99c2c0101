"""The Haiku and PyTorch IPA agree in every stage and gradient; deliberately wrong models must be caught."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from ipa_bridge.config import IPAConfig
from ipa_bridge.proteins import load_structure
from ipa_bridge.proteins.frames import idealised_peptide, random_frames
from ipa_bridge.tolerance import bound, epsilon
from ipa_parity.attention.cases import CATALOGUE, ODD, ODD_MULTIMER, PRESETS, Case, load_weights, make_case
from ipa_parity.attention.judge import judge
from ipa_parity.attention.stages import RUNNERS, Arrays, run_oracle
from ipa_parity.frameworks import installed_frameworks
from ipa_parity.report import Comparison, compare, table

DTYPES = ("float32", "float64")
HALF_DTYPES = ("bfloat16", "float16")

pytestmark = pytest.mark.skipif(not installed_frameworks(), reason="neither jax nor torch is installed")


def assert_parity(comparisons: list[Comparison], compared: list[Comparison]) -> None:
    compared += comparisons
    failures = [str(row) for row in comparisons if not row.passed]
    assert not failures, "\n".join([*failures, table(comparisons)])


@pytest.mark.covering
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CATALOGUE)
def test_every_stage_and_gradient(name, dtype, compared):
    assert_parity(list(judge(CATALOGUE[name](), dtype, frameworks=installed_frameworks())), compared)


@pytest.mark.covering
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in ("alphafold2", "alphafold-multimer", "peptide", "spread-50", "offset-1000")
        for dtype in HALF_DTYPES
    ],
)
def test_half_precision_activations_keep_the_float32_contract(name, dtype, compared):
    assert_parity(list(judge(CATALOGUE[name](), dtype, frameworks=installed_frameworks())), compared)


@pytest.mark.parametrize("dtype", [*DTYPES, *HALF_DTYPES])
def test_attention_collapsed_onto_itself(dtype, compared):
    """Residues lie alone at ±100; outputs are compared, but gradients through the softmax are only rounding."""
    case = make_case("scattered", ODD, (13,), spread=100.0)
    assert_parity(list(judge(case, dtype, frameworks=installed_frameworks(), gradients=False)), compared)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_residue(dtype):
    """The softmax has one entry, so logits are constant; everything else is compared."""
    case = make_case("one-residue", ODD, (1,))
    rows = list(judge(case, dtype, frameworks=installed_frameworks(), gradients=False))
    assert {row.stage for row in rows if not row.passed} == {"logits"}
    assert {row.problem for row in rows if not row.passed} == {"the reference is all zero"}


@pytest.mark.parametrize(
    ("actual", "expected", "problem"),
    [
        (np.ones(3), np.ones(2), r"shape \(3,\) where \(2,\) was expected"),
        (np.array([1.0, np.nan]), np.ones(2), "not finite"),
        (np.ones(2), np.array([1.0, np.inf]), "not finite"),
        (np.ones(0), np.ones(0), "nothing to compare"),
        (np.zeros(2), np.zeros(2), "the reference is all zero"),
    ],
)
def test_arrays_that_cannot_be_compared_do_not_pass(actual, expected, problem):
    names = {"case": "", "stage": "out", "dtype": "float64", "subject": "one", "reference": "other"}
    row = compare(actual, expected, **names)
    assert not row.passed
    assert re.fullmatch(problem, row.problem)


@pytest.mark.parametrize("dtype", [*DTYPES, *HALF_DTYPES])
def test_bounds_are_the_tables(dtype):
    """An error a tenth below the bound passes, a tenth above fails. For points, far frames widen the bound."""
    names = {"case": "", "stage": "out", "dtype": dtype, "subject": "one", "reference": "other"}
    one, step = np.ones(3), bound("out", dtype) * epsilon(dtype)
    for conditioning in (1.0, 3.0):
        passed = [compare(one + x * conditioning * step, one, **names, conditioning=conditioning) for x in (0.9, 1.1)]
        assert [row.passed for row in passed] == [True, False]
    rows = list(judge(CATALOGUE["monomer"](), dtype, frameworks=installed_frameworks()[:1], gradients=False))
    assert {row.stage for row in rows if row.bound != bound(row.stage, dtype)} <= {"points", "norms"}


@pytest.mark.parametrize("name", installed_frameworks())
def test_points_at_the_origin_are_as_long_as_epsilon_says(name):
    """The norm is √(0 + ε) or √max(0, ε²) there; points of random frames are too long to show ε."""
    module = importlib.import_module(f"ipa_{name}.invariant_point_attention")
    array = importlib.import_module("torch").zeros if name == "torch" else importlib.import_module("jax.numpy").zeros
    for config, length in ((ODD, ODD.norm_epsilon**0.5), (ODD_MULTIMER, ODD_MULTIMER.norm_epsilon)):
        np.testing.assert_allclose(np.asarray(module.lengths(config, array((2, 3)))), length, rtol=1e-6)


@pytest.mark.covering
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["1gcn.pdb", "2rbg.pdb", "3zee.cif"])
def test_real_proteins(name, dtype, structures_dir, compared):
    structure = load_structure(structures_dir / name)
    case = make_case(name, IPAConfig.alphafold2(), structure=structure)
    assert_parity(list(judge(case, dtype, frameworks=installed_frameworks())), compared)


def transposed_rotations(case: Case) -> Case:
    return replace(case, rotation=np.swapaxes(case.rotation, -1, -2))


def swapped_query_and_key_points(case: Case) -> Case:
    """The value points, which the monomer layout stores after each head's key points, are not swapped."""
    arrays, config = dict(case.weights.arrays), case.config
    for leaf in ("weights", "bias"):
        if config.layout == "multimer":
            q, k = (f"{letter}_point_projection/point_projection/{leaf}" for letter in "qk")
            arrays[q], arrays[k] = arrays[k], arrays[q]
        else:
            q, kv = (arrays[f"{letter}_point_local/{leaf}"].copy() for letter in ("q", "kv"))
            queries, keys = (x.reshape(*x.shape[:-1], 3 * config.num_head, -1) for x in (q, kv))
            number = config.num_point_qk
            queries[:], keys[..., :number] = keys[..., :number].copy(), queries.copy()
            arrays[f"q_point_local/{leaf}"], arrays[f"kv_point_local/{leaf}"] = q, kv
    return _with_weights(case, arrays)


def sharper_point_weights(case: Case) -> Case:
    """γ is larger by a thousandth."""
    return _with_weights(case, {"trainable_point_weights": 1.001 * case.weights.arrays["trainable_point_weights"]})


def dropped_pair_bias(case: Case) -> Case:
    return _with_weights(case, {"attention_2d/weights": 0 * case.weights.arrays["attention_2d/weights"]})


def inverted_mask(case: Case) -> Case:
    return replace(case, mask=~case.mask)


def dropped_transpose(case: Case) -> Case:
    """The output projection read as if torch's (out, in) memory were haiku's (in, out)."""
    weights = case.weights.arrays["output_projection/weights"]
    return _with_weights(case, {"output_projection/weights": weights.T.reshape(weights.shape)})


def point_major_points(case: Case) -> Case:
    """Points are read with the coordinate as the last axis."""
    multimer = case.config.layout == "multimer"
    name = "v_point_projection/point_projection/weights" if multimer else "kv_point_local/weights"
    weights = case.weights.arrays[name]
    per_point = weights.reshape(*weights.shape[:-1], 3, -1)
    return _with_weights(case, {name: np.swapaxes(per_point, -1, -2).reshape(weights.shape)})


def swapped_keys_and_values(case: Case) -> Case:
    """The monomer layout's [K|V] of each head read as [V|K]; the multimer's key and value weights exchanged."""
    arrays = dict(case.weights.arrays)
    if case.config.layout == "multimer":
        k, v = ("k_scalar_projection/weights", "v_scalar_projection/weights")
        width = min(arrays[k].shape[-1], arrays[v].shape[-1])
        for one, other in ((k, v), (v, k)):
            arrays[one] = case.weights.arrays[one].copy()
            arrays[one][..., :width] = case.weights.arrays[other][..., :width]
    else:
        kv = arrays["kv_scalar/weights"]
        per_head = kv.reshape(len(kv), case.config.num_head, -1)
        arrays["kv_scalar/weights"] = np.roll(per_head, case.config.num_scalar_v, -1).reshape(kv.shape)
    return _with_weights(case, arrays)


def _with_weights(case: Case, changed: dict) -> Case:
    return replace(case, weights=replace(case.weights, arrays={**case.weights.arrays, **changed}))


@pytest.fixture(scope="module")
def users_own(request) -> Case:
    """The user's weights and protein; by default AlphaFold 2's sizes and the idealised peptide."""
    weights_file, structure_file, preset = (
        request.config.getoption(name) for name in ("--weights", "--structure", "--preset")
    )
    weights = load_weights(weights_file, preset) if weights_file else None
    structure = load_structure(structure_file) if structure_file else idealised_peptide()
    config = weights.config if weights else PRESETS[preset or "alphafold2"]()
    return make_case("your own", config, weights=weights, structure=structure)


@pytest.mark.users_own
@pytest.mark.parametrize("dtype", [*DTYPES, *HALF_DTYPES])
def test_users_own_weights_and_protein(dtype, users_own, compared):
    assert_parity(list(judge(users_own, dtype, frameworks=installed_frameworks())), compared)


@pytest.mark.users_own
@pytest.mark.parametrize("framework", installed_frameworks())
def test_users_own_model_sees_no_motion_of_the_whole(framework, users_own):
    turn, shift = random_frames(np.random.default_rng(0), (), spread=10.0)
    moved = replace(users_own, rotation=turn @ users_own.rotation, translation=users_own.translation @ turn.T + shift)
    still, away = (RUNNERS[framework](case, gradients=False)["out"] for case in (users_own, moved))
    size = 1 + np.abs(moved.translation).max() / np.abs(users_own.translation).max()
    names = {"case": "your own", "stage": "out", "dtype": "float64", "subject": framework, "reference": "still"}
    row = compare(away, still, **names, conditioning=size)
    assert row.passed, str(row)


@pytest.mark.users_own
@pytest.mark.parametrize("framework", installed_frameworks())
@pytest.mark.parametrize("mutate", [transposed_rotations, sharper_point_weights, dropped_transpose, inverted_mask])
def test_users_own_comparison_catches(mutate, framework, users_own):
    truth = run_oracle(users_own)
    wrong = RUNNERS[framework](mutate(users_own), gradients=False)
    names = {"case": "your own", "stage": "out", "dtype": "float64", "subject": framework, "reference": "oracle"}
    assert not compare(wrong["out"], truth["out"], **names).passed


MUTANTS = (
    transposed_rotations,
    swapped_query_and_key_points,
    swapped_keys_and_values,
    sharper_point_weights,
    dropped_pair_bias,
    inverted_mask,
    dropped_transpose,
    point_major_points,
)


HONEST = dict(RUNNERS)


@functools.cache
def honest_run(framework: str, name: str, dtype: str) -> Arrays:
    return HONEST[framework](CATALOGUE[name]().astype(dtype))


@pytest.mark.covering("framework")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["monomer", "multimer"])
@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda mutate: mutate.__name__)
def test_negative_controls_are_caught(mutate: Callable[[Case], Case], framework, name, dtype, monkeypatch):
    """A framework that runs a slightly different function fails against the oracle, in outputs and in gradients."""
    if len(installed_frameworks()) < 2:
        pytest.skip("one framework is held against the other, and one of them is not installed")
    from ipa_parity.attention import stages

    other = "torch" if framework == "jax" else "jax"
    dtype_of = lambda case: np.dtype(case.single.dtype).name  # noqa: E731
    mutant = lambda case, **options: HONEST[framework](mutate(case), **options)  # noqa: E731
    monkeypatch.setitem(stages.RUNNERS, framework, mutant)
    monkeypatch.setitem(stages.RUNNERS, other, lambda case, **_: honest_run(other, name, dtype_of(case)))
    rows = list(judge(CATALOGUE[name](), dtype, frameworks=[other, framework]))
    caught = {row.stage for row in rows if framework in (row.subject, row.reference) and not row.passed}
    assert "out" in caught
    assert any(stage.startswith("gradient/") for stage in caught)
    spared = [row for row in rows if (row.subject, row.reference) == (other, "float64") and not row.passed]
    assert not [row for row in spared if not row.stage.startswith("gradient/")]
