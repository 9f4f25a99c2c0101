"""The weighted sum of all losses on the structure module."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from alphafolds_losses import alphafold_total, as_alphafold
from loss_cases import lddt, plddt, total
from loss_frameworks import LOSS, allowed, assert_close
from loss_problems import (
    LAYERED,
    Frames,
    Problem,
    cast,
    cotangent,
    hard_problem,
    load_problem,
    map_floats,
    synthetic_problem,
)


def test_alphafolds_gradients_agree(problem, framework):
    expected = as_alphafold(partial(alphafold_total, gradient=True), problem)

    def ours(losses, x):
        return total(losses, x).loss

    weight = cotangent(0, ())
    _, _, rotation, translation, atom14, angles, unnormalized, logits = framework.gradients(ours, problem)
    assert (logits == 0).all()
    actual = [x / weight for x in (atom14, rotation, translation, angles, unnormalized)]
    assert_close(actual, expected, 1e-6)


def test_a_perfect_prediction_has_no_loss(framework):
    p = hard_problem("perfect")
    loss = framework.losses.StructureModuleLoss(*framework.call(total, p))
    floor = np.sqrt(1e-4) / 10
    assert loss.fape <= floor * 1.001
    assert loss.backbone <= floor * 1.001
    assert loss.sidechain_fape <= floor * 1.001
    assert framework.call(lddt, p)[0] == pytest.approx(1)


def test_padding_does_not_count(structures_dir, framework):
    """Contents of masked residues do not change the loss."""
    pytest.importorskip("gemmi")
    p = load_problem(structures_dir / "2rbg.pdb")
    padding = ~p.mask
    assert padding.any()
    spoiled = p._replace(
        aatype=np.where(padding, -1, p.aatype),
        atom14=np.where(padding[:, None, None], 7.0, p.atom14),
        unnormalized=np.where(padding[:, None, None], 7.0, p.unnormalized),
        backbone=p.backbone._replace(translation=np.where(padding[:, None], 7.0, p.backbone.translation)),
    )
    for function in (total, partial(total, chains=True), plddt):
        assert_close(framework.call(function, spoiled), framework.call(function, p), LOSS)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_an_empty_chain_has_no_loss(chunk_size, framework):
    def nothing(name, x):
        if isinstance(x, Frames):
            return Frames(*(nothing(name, y) for y in x))
        return x if x.ndim == 0 else x[:, :0] if name in LAYERED else x[:0]

    p = synthetic_problem()
    p = Problem(*(nothing(name, x) for name, x in p._asdict().items()))
    assert all((x == 0).all() for x in framework.call(partial(total, chains=True, chunk_size=chunk_size), p))
    emptied = Problem(
        *(
            Frames(*(y[:, None][:, :0] if n in LAYERED else y[None][:0] for y in x))
            if isinstance(x, Frames)
            else x[:, None][:, :0]
            if n in LAYERED
            else np.asarray(x)[None][:0]
            for n, x in synthetic_problem()._asdict().items()
        )
    )
    assert framework.call(partial(total, chunk_size=chunk_size), emptied)[0].shape == (0,)


def test_the_loss_comes_in_the_predictions_dtype(framework):
    """The loss does not become float64 when the target, read from a file, is float64."""
    p = synthetic_problem()
    truth = {"true_groups", "true_atom14", "true_chi"}
    mixed = map_floats(lambda name, x: x if name in truth else x.astype(np.float32), p)
    assert {x.dtype.name for x in framework.call(total, mixed)} == {"float32"}
    expected = framework.call(total, cast(p, "float32"))
    assert_close(framework.call(total, mixed), expected, allowed("loss", "float32"))
