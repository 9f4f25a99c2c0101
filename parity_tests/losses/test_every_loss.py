"""Every loss equals AlphaFold's, agrees in both frameworks, and is finite, invariant and differentiable."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from alphafolds_losses import MONOMER, ROUNDED, as_alphafold
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    CHUNKED,
    LOSSES,
    bonds,
    clashes,
    fape,
    fape_of_pairs,
    last,
    lddt,
    plddt,
    renamed,
    sidechain,
    total,
    true_backbone,
    violations,
    with_chains,
)
from loss_frameworks import DTYPES, GRADIENT, LOSS, Jax, Torch, allowed, assert_close, inputs, one_of
from loss_problems import HARD, Frames, Problem, cast, hard_problem, map_floats, synthetic_problem, two

from ipa_bridge.proteins.frames import random_frames
from ipa_parity.structure_module.stages import TERMS


def test_every_loss_has_a_case():
    """The cases of `LOSSES` call every public function, except two that other tests call; the twins have the same."""
    framework, called = one_of(Torch), set()

    class Recorder:
        def __getattr__(self, name):
            called.add(name)
            return getattr(framework.losses, name)

    for function in LOSSES.values():
        framework.numpy(function(Recorder(), inputs(framework, synthetic_problem())))
    public = {name for name in framework.losses.__all__ if name.islower()}
    uncalled, elsewhere = public - called, {"structure_target", "extreme_ca_ca_distance_violations"}
    assert uncalled == elsewhere, (
        f"add a case that calls {sorted(uncalled - elsewhere)} to LOSSES of parity_tests/losses/loss_cases.py; remove "
        f"{sorted(elsewhere - uncalled)} from the exceptions here"
    )


def test_parity_is_judged_on_every_term(framework):
    """`ipa_parity` and both frameworks have the same terms in their sums."""
    assert tuple(framework.losses.TERMS) == TERMS, (
        "TERMS of losses/__init__.py (left) and of ipa_parity/structure_module/stages.py (right) must be the same"
    )


@pytest.mark.covering("framework")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", MONOMER)
def test_alphafold_agrees(loss, dtype, problem, framework):
    ours, theirs = MONOMER[loss]
    p = cast(problem, dtype)
    expected = as_alphafold(theirs, p, dtype)
    actual = framework.call(ours, p)
    assert {x.dtype.name for x in actual if np.issubdtype(x.dtype, np.floating)} == {dtype}
    assert_close(actual, expected, allowed("loss", dtype) if dtype == "float32" else ROUNDED.get(loss, LOSS))


@pytest.mark.covering
@pytest.mark.parametrize("loss", LOSSES)
def test_the_frameworks_agree(loss, problem):
    jax, torch = one_of(Jax), one_of(Torch)
    assert_close(torch.call(LOSSES[loss], problem), jax.call(LOSSES[loss], problem), LOSS)
    assert_close(torch.gradients(LOSSES[loss], problem), jax.gradients(LOSSES[loss], problem), GRADIENT)


@pytest.mark.parametrize("loss", ["violations", "total of chains", "plddt"])
def test_the_frameworks_agree_in_float32(loss, problem):
    p = cast(problem, "float32")
    assert_close(one_of(Torch).call(LOSSES[loss], p), one_of(Jax).call(LOSSES[loss], p), allowed("loss", "float32"))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_is_its_members(loss, framework):
    batch, ones = two(synthetic_problem())
    each = [framework.call(LOSSES[loss], one) for one in ones]
    expected = [np.stack(xs) for xs in zip(*each, strict=True)]
    assert_close(framework.call(LOSSES[loss], batch), expected, LOSS)
    assert_close(framework.vmapped(LOSSES[loss], batch), expected, LOSS)


@settings(max_examples=4)
@given(seed=st.integers(0, 2**32 - 2))
@pytest.mark.parametrize("loss", LOSSES)
def test_moving_everything_changes_nothing(loss, framework, seed):
    p = synthetic_problem()
    motions = [random_frames(np.random.default_rng(seed + i), (), spread=20.0) for i in range(2)]

    def moved(x, motion):
        rotation, translation = motion
        if isinstance(x, Frames):
            return Frames(rotation @ x.rotation, moved(x.translation, motion))
        return x @ rotation.T + translation

    q = p._replace(
        **{name: moved(getattr(p, name), motions[0]) for name in ("backbone", "groups", "atom14")},
        **{name: moved(getattr(p, name), motions[1]) for name in ("true_groups", "true_atom14")},
    )
    if loss in ("renamed", "renamed frames"):
        assert_close(framework.call(renamed, q)[1:], framework.call(renamed, p)[1:], 0)
    else:
        assert_close(framework.call(LOSSES[loss], q), framework.call(LOSSES[loss], p), GRADIENT)


@pytest.mark.covering("framework")
@pytest.mark.parametrize("chunk_size", [4, 1000])
@pytest.mark.parametrize("loss", CHUNKED)
def test_chunks_change_nothing(loss, chunk_size, framework):
    p, function = synthetic_problem(), CHUNKED[loss]
    chunked = partial(function, chunk_size=chunk_size)
    assert_close(framework.call(chunked, p), framework.call(function, p), LOSS)
    assert_close(framework.gradients(chunked, p), framework.gradients(function, p), GRADIENT)


def everything(losses, x):
    of_losses = [total(losses, x), total(losses, x, chains=True, chunk_size=4)]
    return of_losses, violations(losses, x), renamed(losses, x), lddt(losses, x), plddt(losses, x)


@pytest.mark.parametrize("kind", HARD)
def test_hard_cases_are_finite(kind, framework):
    p = cast(hard_problem(kind), "float32")

    assert all(np.isfinite(x).all() for x in framework.call(everything, p))
    assert all(np.isfinite(x).all() for x in framework.gradients(everything, p))


def test_masks_of_any_dtype(framework):
    p = synthetic_problem()
    names = ("group_mask", "atom14_mask", "chi_mask", "exists", "mask")
    for dtype in (np.int32, np.float64):
        q = p._replace(**{name: getattr(p, name).astype(dtype) for name in names})
        for function in (LOSSES["total of chains"], fape_of_pairs, plddt):
            assert_close(framework.call(function, q), framework.call(function, p), LOSS)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_computes_in_float32(dtype, framework):
    from ipa_bridge.weights.tensors import numpy_dtype

    half = map_floats(lambda _, x: x.astype(np.float32).astype(numpy_dtype(dtype)), synthetic_problem())
    widened = Problem(
        *(
            Frames(*(y.astype(np.float32) for y in x))
            if isinstance(x, Frames)
            else x.astype(np.float32)
            if x.dtype == numpy_dtype(dtype)
            else x
            for x in half
        )
    )
    for function in (total, plddt):
        assert_close(framework.call(function, half), framework.call(function, widened), allowed("loss", "float32"))


def test_bad_inputs_raise(framework):
    p = synthetic_problem()
    n = len(p.mask)
    with pytest.raises(
        ValueError, match=rf"predicted_points must be \({n}, 3\) to fit points_mask; got \({n - 1}, 3\)"
    ):
        framework.call(
            lambda losses, x: losses.frame_aligned_point_error(
                last(x.backbone), true_backbone(x), x.mask, x.atom14[1:, 1], x.true_atom14[:, 1], x.mask
            ),
            p,
        )
    for function in (fape, sidechain, renamed, clashes):
        with pytest.raises(ValueError, match="chunk_size must be at least 1"):
            framework.call(partial(function, chunk_size=0), p)
    with pytest.raises(ValueError, match="residue_index must be"):
        framework.call(clashes, p._replace(residue_index=p.residue_index[1:]))
    with pytest.raises(ValueError, match="chain_id must be"):
        framework.call(with_chains(bonds), p._replace(chain_id=p.chain_id[1:]))
    with pytest.raises(ValueError, match="logits must be"):
        framework.call(plddt, p._replace(logits=p.logits[1:]))
