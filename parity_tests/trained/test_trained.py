"""Trained weights in their published packages: every attention, and the whole model before and after the swap."""

from __future__ import annotations

import pytest
import torch
from trained_judge import compare_attention, compare_whole, loaded, swapped
from trained_models import MODELS

from ipa_bridge.tolerance import WHOLE_MODEL
from ipa_bridge.weights import Weights

pytestmark = pytest.mark.trained

LAYERS = [(name, i) for name, trained in MODELS.items() for i in range(trained.layers)]


@pytest.mark.parametrize("name", MODELS)
def test_every_attention_is_swapped(name):
    """The file's weights are those of the loaded model, bit by bit, in every layer that is swapped."""
    trained = MODELS[name]
    _, report = swapped(trained)
    assert len(report.replaced) == trained.layers
    assert not report.left_alone
    for row in report.replaced:
        root = trained.root + row.path.removeprefix(trained.within)
        read = Weights.load(trained.path, root=root, dialect=trained.dialect).to_torch(dialect=trained.dialect)
        state = loaded(trained).get_submodule(row.path).state_dict()
        assert read
        assert all(torch.equal(x, state[theirs]) for theirs, x in read.items())


@pytest.mark.parametrize(("name", "i"), LAYERS)
def test_attention(name, i, measured):
    """Outputs and gradients of one attention: swapped, in our PyTorch module and in our Haiku module."""
    trained = measured["models"][name] = MODELS[name]
    path = swapped(trained)[1].replaced[i].path
    rows = compare_attention(name, trained, path)
    measured["attentions"] += rows
    failed = [str(row) for row in rows if not row.passed and row.subject != "before"]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", MODELS)
def test_whole_model(name, dtype, measured):
    """The swap changes a prediction as much as half an ulp of noise at the inputs does, and no more."""
    trained = measured["models"][name] = MODELS[name]
    row = compare_whole(name, trained, dtype)
    measured["wholes"].append(row)
    assert row.noise > 0
    assert row.apart <= WHOLE_MODEL * row.noise
    assert row.after <= WHOLE_MODEL * max(row.before, row.noise)
