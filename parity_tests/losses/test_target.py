"""The target that the losses need, and batches of targets."""

from __future__ import annotations

import numpy as np
import pytest
from loss_frameworks import LOSS, Jax, Torch, assert_close, one_of
from loss_problems import gathered, synthetic_problem, true_chis, true_group_frames

from ipa_bridge.proteins import load_structure, residues


def test_the_target_of_a_real_protein(structures_dir, framework):
    """The target has frames, torsions and atoms where the file has atoms; padding has none."""
    pytest.importorskip("gemmi")
    structure = load_structure(structures_dir / "2rbg.pdb")
    aatype, mask = structure.aatype.astype(np.int32), np.arange(len(structure)) % 9 > 0
    chain = np.unique(structure.chain_id, return_inverse=True)[1]
    numbers = structure.residue_number
    resolved = structure.atom37_mask & (np.random.default_rng(0).random(structure.atom37_mask.shape) > 0.04)
    arrays = (structure.atom37, resolved, aatype, mask, numbers)
    target = framework.losses.structure_target(*map(framework.array, arrays), chain_id=framework.array(chain))
    known = resolved & mask[:, None]
    frames, group_mask = true_group_frames(aatype, structure.atom37, known)
    chi, chi_mask = true_chis(aatype, structure.atom37, known)
    slots = residues.ATOM14_TO_ATOM37[aatype]
    atom14_mask = residues.ATOM14_MASK[aatype] & np.take_along_axis(known, slots, 1)
    assert 0 < group_mask[:, 0].sum() < mask.sum()
    assert 0 < chi_mask.sum() < residues.CHI_MASK[aatype][mask].sum()
    expected = (aatype, mask, numbers, *frames, group_mask, gathered(structure.atom37, slots), atom14_mask, chi)
    actual = framework.numpy(target)
    assert_close(actual[:6], [*expected[:3], *frames, group_mask], LOSS)
    np.testing.assert_allclose(actual[6][atom14_mask], expected[6][atom14_mask])
    np.testing.assert_array_equal(actual[7], atom14_mask)
    assert_close(actual[8:], [chi, chi_mask, chain], LOSS)
    with pytest.raises(ValueError, match="chain_id must be"):
        framework.losses.structure_target(*map(framework.array, arrays), chain_id=framework.array(chain[1:]))
    for anything in (np.nan, np.inf, 1e30):
        unknown = np.where(known[..., None], structure.atom37, anything)
        again = framework.losses.structure_target(
            *map(framework.array, (unknown, *arrays[1:])), chain_id=framework.array(chain)
        )
        np.testing.assert_array_equal(framework.numpy(again)[6], np.where(atom14_mask[..., None], actual[6], 0))
        assert_close(framework.numpy(again)[3:6], actual[3:6], LOSS)
        assert_close(framework.numpy(again)[8:], actual[8:], LOSS)


def test_a_structures_float64_is_taken_in_silence(structures_dir):
    """JAX without float64 reads it without a warning (warnings are errors here)."""
    pytest.importorskip("gemmi")
    framework = one_of(Jax)
    structure = load_structure(structures_dir / "2rbg.pdb")
    chain = np.unique(structure.chain_id, return_inverse=True)[1]
    arrays = (structure.atom37, structure.atom37_mask, structure.aatype, structure.mask, structure.residue_number)
    assert structure.atom37.dtype == np.float64
    with framework.jax.enable_x64(False):
        target = framework.losses.structure_target(*arrays, chain_id=chain)
    leaves = framework.jax.tree.leaves(target)
    assert all(isinstance(x, framework.jax.Array) for x in leaves)
    assert {x.dtype.name for x in leaves} == {"float32", "int32", "bool"}
    expected = framework.losses.structure_target(*map(framework.array, arrays), chain_id=framework.array(chain))
    np.testing.assert_allclose(target.atom14, expected.atom14, atol=1e-5)


def target_of(framework, p, *, chains):
    atom37, mask37 = np.zeros((len(p.mask), 37, 3)), residues.ATOM37_MASK[p.aatype]
    atom37[mask37] = p.true_atom14[residues.ATOM14_MASK[p.aatype]]  # the atoms do not matter here
    arrays = map(framework.array, (atom37, mask37, p.aatype, p.mask, p.residue_index))
    return framework.losses.structure_target(*arrays, chain_id=framework.array(p.chain_id) if chains else None)


@pytest.mark.parametrize("chains", [False, True])
def test_targets_collate(chains):
    """PyTorch's DataLoader collates targets, alone and within other data; a monomer has no chain_id."""
    framework = Torch()
    collate = framework.torch.utils.data.default_collate
    arrays = lambda target: framework.numpy(target if chains else list(target)[:-1])  # noqa: E731
    one, other = (target_of(framework, synthetic_problem(seed), chains=chains) for seed in (0, 1))
    batch = collate([one, other])
    assert type(batch) is framework.losses.StructureTarget
    assert (batch.chain_id is not None) == chains
    assert type(batch.group_frames) is framework.rigid
    for i, member in enumerate((one, other)):
        for actual, expected in zip(arrays(batch), arrays(member), strict=True):
            np.testing.assert_array_equal(actual[i], expected)
    nested = collate([{"target": one}, {"target": other}])["target"]
    for actual, expected in zip(arrays(nested), arrays(batch), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_targets_with_and_without_chains_do_not_collate():
    framework = Torch()
    targets = [target_of(framework, synthetic_problem(), chains=chains) for chains in (True, False)]
    with pytest.raises(
        ValueError, match="chain_id must be given in all targets of a batch or in none; 1 of 2 have none"
    ):
        framework.torch.utils.data.default_collate(targets)
