"""The frame aligned point error of backbones and side chains."""

from __future__ import annotations

import importlib
from functools import partial

import numpy as np
import pytest
from alphafolds_losses import alphafold, as_alphafold, head_config, rigid3
from loss_cases import backbone, sidechain, true_backbone, with_chains
from loss_frameworks import Jax, assert_close
from loss_problems import Frames, cast, unit

from ipa_bridge.proteins import residues
from ipa_bridge.proteins.frames import random_frames


def test_alphafold_multimers_side_chains_agree(problem, framework):
    p = cast(problem, "float32")

    def flat(frames):
        return rigid3(Frames(frames.rotation.reshape(-1, 3, 3), frames.translation.reshape(-1, 3)))

    def theirs(p):
        vec3 = alphafold().geometry.Vec3Array.from_array
        return [
            alphafold().all_atom_multimer.frame_aligned_point_error(
                pred_frames=flat(p.groups),
                target_frames=flat(p.true_groups),
                frames_mask=p.group_mask.reshape(-1).astype(np.float32),
                pred_positions=vec3(p.atom14.reshape(-1, 3)),
                target_positions=vec3(p.true_atom14.reshape(-1, 3)),
                positions_mask=p.atom14_mask.reshape(-1).astype(np.float32),
                pair_mask=None,
                length_scale=10.0,
                l1_clamp_distance=10.0,
            )
        ]

    assert_close(framework.call(sidechain, p), as_alphafold(theirs, p, "float32"), 1e-3)


def test_alphafold_multimers_backbone_agrees(problem, framework):
    """AlphaFold-Multimer uses √max(d², ε²), we use √(d² + ε): they differ by less than ε/2d."""
    p = cast(problem, "float32")
    config = head_config(multimer=True)
    known = p.group_mask[..., 0].astype(np.float32)

    def theirs(p, pair_mask, config):
        return alphafold().folding_multimer.backbone_loss(
            gt_rigid=rigid3(true_backbone(p)),
            gt_frames_mask=known,
            gt_positions_mask=known,
            target_rigid=rigid3(p.backbone),
            config=config,
            pair_mask=pair_mask,
        )

    same = (p.chain_id[:, None] == p.chain_id).astype(np.float32)
    intra = as_alphafold(partial(theirs, pair_mask=same, config=config.intra_chain_fape), p, "float32")
    inter = as_alphafold(partial(theirs, pair_mask=1 - same, config=config.interface_fape), p, "float32")
    expected = [one + other for one, other in zip(intra, inter, strict=True)]
    assert_close(framework.call(with_chains(backbone), p), expected, 1e-3)
    if p.chain_id[0] != p.chain_id[-1]:
        assert inter[0] > 0.1
        assert abs(framework.call(backbone, p)[0] - expected[0]) > 0.01


def test_unknown_residues_have_the_frames_of_their_backbones(framework):
    """AlphaFold predicts all-zero rotations for them, so there even a perfect prediction has a loss."""
    rng = np.random.default_rng(0)
    aatype = np.full(4, residues.UNKNOWN_AATYPE, np.int32)
    rigids, angles = random_frames(rng, (4,)), unit(rng.standard_normal((4, 7, 2)))
    atoms, known = rng.standard_normal((4, 14, 3)), np.ones((4, 14), bool)
    backbone = np.tile(np.arange(8) == 0, (4, 1))

    def frames_and_losses(rotation, translation, angles, aatype, backbone, atoms, known):
        of_module = importlib.import_module(framework.rigid.__module__.partition(".")[0]).torsion_angles_to_frames
        frames = of_module(framework.rigid(rotation, translation), angles, aatype)
        losses = (
            framework.losses.sidechain_loss(predicted, frames, backbone, atoms, atoms, known)
            for predicted in (frames, frames._replace(rotation=0 * frames.rotation))
        )
        return frames.rotation, *losses

    jit = framework.jax.jit if isinstance(framework, Jax) else lambda function: function
    arrays = map(framework.array, (*rigids, angles, aatype, backbone, atoms, known))
    rotation, ours, theirs = framework.numpy(jit(frames_and_losses)(*arrays))
    np.testing.assert_array_equal(rotation[:, 0], rigids[0])
    assert ours == pytest.approx(np.sqrt(1e-4) / 10, rel=1e-3)
    assert theirs > 0.05
    if importlib.util.find_spec("alphafold"):
        from alphafold.common import residue_constants

        assert not residue_constants.restype_rigid_group_default_frame[residues.UNKNOWN_AATYPE].any()
