"""IgFold's trained weights: every attention of its four models, and an antibody folded before and after the swap."""

from __future__ import annotations

import pytest

pytest.importorskip("igfold", reason="make trained WITH=igfold installs it")
from igfold_models import IGFOLD, output, with_haiku
from trained_judge import compare_attention, compare_whole, loaded, swapped

from ipa_bridge.tolerance import WHOLE_MODEL

pytestmark = pytest.mark.igfold

NAMES = [f"IgFold {i}" for i in (1, 2, 3, 5)]


def test_its_models_are_these():
    assert list(IGFOLD) == NAMES


@pytest.mark.parametrize("i", range(7))
@pytest.mark.parametrize("name", NAMES)
def test_attention(name, i, measured):
    """Outputs and gradients of one attention: swapped, in our PyTorch module and in our Haiku module."""
    trained = measured["models"][name] = IGFOLD[name]
    _, report = swapped(trained)
    assert len(report.replaced) == trained.layers
    rows = compare_attention(name, trained, report.replaced[i].path)
    measured["attentions"] += rows
    failed = [str(row) for row in rows if not row.passed and row.subject != "before"]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_whole_model(name, dtype, measured):
    """The swap changes the fold as much as half an ulp of noise at the inputs does, and no more."""
    row = compare_whole(name, IGFOLD[name], dtype)
    measured["wholes"].append(row)
    judge(row)


def test_with_haiku_inside(measured):
    """Attentions of the structure and of its error are computed in Haiku; a template's, all masked, stays as it is."""
    trained = IGFOLD["IgFold 1"]
    paths = [row.path for row in swapped(trained)[1].replaced if not row.path.startswith("template")]
    row = compare_whole("IgFold 1, Haiku inside", trained, "float32", with_haiku(trained, loaded(trained), paths))
    measured["models"][row.name] = trained
    measured["wholes"].append(row)
    assert len(paths) == 5
    judge(row)


def test_it_folds_an_antibody():
    """IgFold is sure of its structure, so the language model's embeddings are what it was trained on."""
    assert output(loaded(IGFOLD["IgFold 1"])).prmsd.median() < 0.5  # Å


def judge(row):
    assert row.noise > 0
    assert row.apart <= WHOLE_MODEL * row.noise
    assert row.after <= WHOLE_MODEL * max(row.before, row.noise)
