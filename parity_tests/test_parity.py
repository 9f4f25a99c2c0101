"""The Haiku and the PyTorch IPA are one function: every stage and gradient, and mutants that must be caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from ipa_bridge.config import IPAConfig
from ipa_bridge.frames import idealised_peptide
from ipa_bridge.structures import load_structure
from ipa_bridge.weights import Weights
from ipa_parity.cases import CATALOGUE, ODD, Case, make_case
from ipa_parity.parity import installed_frameworks, judge
from ipa_parity.report import Comparison, table

DTYPES = ("float32", "float64")
HALF_DTYPES = ("bfloat16", "float16")

pytestmark = pytest.mark.skipif(not installed_frameworks(), reason="neither jax nor torch is installed")


def assert_parity(comparisons: list[Comparison], compared: list[Comparison]) -> None:
    compared += comparisons
    failures = [str(row) for row in comparisons if not row.passed]
    assert not failures, "\n".join([*failures, table(comparisons)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CATALOGUE)
def test_every_stage_and_gradient(name, dtype, compared):
    assert_parity(list(judge(CATALOGUE[name](), dtype, frameworks=installed_frameworks())), compared)


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
    """Residues alone at ±100: outputs are compared, gradients through the softmax are rounding."""
    case = make_case("scattered", ODD, (13,), spread=100.0)
    assert_parity(list(judge(case, dtype, frameworks=installed_frameworks(), gradients=False)), compared)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_residue(dtype):
    """Its softmax is over itself, so logits are a constant; all else is compared."""
    case = make_case("one-residue", ODD, (1,))
    rows = list(judge(case, dtype, frameworks=installed_frameworks(), gradients=False))
    assert {row.stage for row in rows if not row.passed} == {"logits"}
    assert {row.problem for row in rows if not row.passed} == {"the reference is all zero"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["1gcn.pdb", "2rbg.pdb", "3zee.cif"])
def test_real_proteins(name, dtype, structures_dir, compared):
    structure = load_structure(structures_dir / name)
    case = make_case(name, IPAConfig.alphafold2(), structure=structure)
    assert_parity(list(judge(case, dtype, frameworks=installed_frameworks())), compared)


@pytest.mark.users_own
@pytest.mark.parametrize("dtype", DTYPES)
def test_users_own_weights_and_protein(dtype, request, compared):
    weights_file, structure_file = (request.config.getoption(name) for name in ("--weights", "--structure"))
    weights = Weights.load(weights_file) if weights_file else None
    structure = load_structure(structure_file) if structure_file else idealised_peptide()
    config = weights.config if weights else IPAConfig.alphafold2()
    case = make_case("your own", config, weights=weights, structure=structure)
    assert_parity(list(judge(case, dtype, frameworks=installed_frameworks())), compared)


def transposed_rotations(case: Case) -> Case:
    return replace(case, rotation=np.swapaxes(case.rotation, -1, -2))


def swapped_query_and_key_points(case: Case) -> Case:
    """With as many value points as the layout packs behind the keys left where they are."""
    names = ("q_point_projection/point_projection", "k_point_projection/point_projection")
    arrays = dict(case.weights.arrays)
    for leaf in ("weights", "bias"):
        q, k = (f"{name}/{leaf}" for name in names)
        arrays[q], arrays[k] = arrays[k], arrays[q]
    return _with_weights(case, arrays)


def sharper_point_weights(case: Case) -> Case:
    """γ a thousandth larger."""
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
    """Multimer points read with the coordinate innermost."""
    name = "v_point_projection/point_projection/weights"
    weights = case.weights.arrays[name]
    per_point = weights.reshape(*weights.shape[:-1], 3, -1)
    return _with_weights(case, {name: np.swapaxes(per_point, -1, -2).reshape(weights.shape)})


def _with_weights(case: Case, changed: dict) -> Case:
    return replace(case, weights=replace(case.weights, arrays={**case.weights.arrays, **changed}))


MUTANTS = (
    transposed_rotations,
    swapped_query_and_key_points,
    sharper_point_weights,
    dropped_pair_bias,
    inverted_mask,
    dropped_transpose,
    point_major_points,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda mutate: mutate.__name__)
def test_negative_controls_are_caught(mutate: Callable[[Case], Case], framework, dtype, monkeypatch):
    """A framework that runs a slightly other function fails against the oracle, on outputs alone and on gradients."""
    pytest.importorskip(framework)
    from ipa_parity import stages

    honest = stages.RUNNERS[framework]
    monkeypatch.setitem(stages.RUNNERS, framework, lambda case, **options: honest(mutate(case), **options))
    other = "torch" if framework == "jax" else "jax"
    frameworks = [name for name in (other, framework) if name in installed_frameworks()]
    rows = list(judge(CATALOGUE["multimer"](), dtype, frameworks=frameworks))
    caught = {row.stage for row in rows if framework in (row.subject, row.reference) and not row.passed}
    assert "out" in caught
    assert any(stage.startswith("gradient/") for stage in caught)
    spared = [row for row in rows if (row.subject, row.reference) == (other, "float64") and not row.passed]
    assert not [row for row in spared if not row.stage.startswith("gradient/")]
