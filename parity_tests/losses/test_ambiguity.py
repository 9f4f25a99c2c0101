"""Ambiguous atoms and frames take AlphaFold's names."""

from __future__ import annotations

import numpy as np
import pytest
from alphafolds_losses import alphafold, as_alphafold, batch_of, to_flat_12
from loss_cases import renamed
from loss_frameworks import assert_close
from loss_problems import Frames, cast, true_group_frames

from ipa_bridge.proteins import load_structure


def test_alphafold_multimers_renaming_agrees(problem, framework):
    p = cast(problem, "float32")
    batch, vec3 = batch_of(p), alphafold().geometry.Vec3Array.from_array

    def theirs(p):
        return alphafold().all_atom_multimer.find_optimal_renaming(
            vec3(batch["atom14_gt_positions"]),
            vec3(batch["atom14_alt_gt_positions"]),
            batch["atom14_atom_is_ambiguous"],
            batch["atom14_gt_exists"],
            vec3(p.atom14),
        )

    *_, better = framework.call(renamed, p)
    np.testing.assert_array_equal(better, as_alphafold(theirs, p, "float32").astype(bool))


def test_renamed_frames_are_alphafolds_alternatives(structures_dir, framework):
    """Frames from renamed atoms, by AlphaFold, are the frames that we rename."""
    pytest.importorskip("gemmi")
    import jax

    structure = load_structure(structures_dir / "2rbg.pdb")
    atom37, mask, aatype = structure.atom37, structure.atom37_mask, structure.aatype.astype(np.int32)
    with jax.numpy_dtype_promotion("standard"):
        theirs = jax.jit(alphafold().all_atom.atom37_to_frames)(aatype, atom37, mask.astype(np.float64))
        theirs = jax.tree.map(np.asarray, theirs)
    groups, group_mask = true_group_frames(aatype, atom37, mask)
    assert (theirs["rigidgroups_gt_exists"].astype(bool) == group_mask).all()
    known = group_mask[..., None]
    assert_close([to_flat_12(groups) * known], [theirs["rigidgroups_gt_frames"] * known], 1e-6)

    better = framework.array(np.ones(len(aatype), bool))
    frames = framework.losses.rename_ambiguous_frames(
        framework.rigid(*map(framework.array, groups)), framework.array(aatype), better
    )
    ours = to_flat_12(Frames(*framework.numpy(frames)))
    assert_close([ours * known], [theirs["rigidgroups_alt_gt_frames"] * known], 1e-6)
    assert np.abs(ours - to_flat_12(groups)).max() > 0.1
