"""Bonds, clashes and distances within residues, also of several chains."""

from __future__ import annotations

from functools import partial

import numpy as np
from alphafolds_losses import alphafold, alphafold_violations_of_chains, as_alphafold
from loss_cases import bonds, clashes, violations, with_chains, within
from loss_frameworks import LOSS, assert_close
from loss_problems import cast, synthetic_problem

from ipa_bridge.proteins import residues


def test_distances_within_residues_agree_to_the_last_digits(problem, framework):
    bounds = [x[problem.aatype] for x in residues.atom14_distance_bounds()]

    def theirs(p):
        return list(alphafold().all_atom.within_residue_violations(p.atom14, p.exists.astype(float), *bounds).values())

    expected = as_alphafold(theirs, problem)
    assert_close(framework.call(within, problem), expected, LOSS)


def test_alphafold_multimer_agrees(problem, framework):
    """AlphaFold-Multimer separates chains by gaps in the index, and uses √max(d², ε²) where we use √(d² + ε)."""
    p = cast(problem, "float32")
    p = p._replace(residue_index=p.residue_index + 5 * p.chain_id)
    expected = as_alphafold(alphafold_violations_of_chains, p, "float32")
    actual = framework.call(partial(violations, chains=True), p)
    assert_close(actual, expected, 1e-4)


def test_chains_are_not_bonded_to_each_other(framework):
    """Two chains with continuous numbers, 50 Å apart: no bond between them is checked, but clashes are."""
    p = synthetic_problem()
    second = p.chain_id == 1
    steps = 2.2 * np.arange(21) + 50.0 * second  # along the diagonal: Cα 3.8 Å apart
    p = p._replace(atom14=residues.ATOM14_POSITIONS[p.aatype] + steps[:, None, None])
    ends = np.flatnonzero(np.diff(p.chain_id))
    assert (np.diff(p.residue_index) == 1).all()
    assert len(ends) == 1
    one, apart = framework.call(bonds, p), framework.call(with_chains(bonds), p)
    assert one[0] > apart[0] + 1
    *_, one = framework.call(lambda losses, x: violations(losses, x)[2].extreme_ca_ca_distance, p)
    *_, apart = framework.call(lambda losses, x: violations(losses, x, chains=True)[2].extreme_ca_ca_distance, p)
    assert one > 0
    assert apart == 0
    # Without the bond, atoms as close as bonded ones clash.
    c, n = 2, 0
    atom14 = 300.0 * np.arange(21)[:, None, None] + 6.0 * np.arange(14)[None, :, None] + np.zeros(3)
    atom14[ends[0] + 1, n] = atom14[ends[0], c] + [1.33, 0, 0]
    close = p._replace(atom14=atom14, exists=residues.ATOM14_MASK[p.aatype])
    assert framework.call(clashes, close)[0] == 0
    assert framework.call(with_chains(clashes), close)[0] > 0


def test_alphafold_multimers_clashes_know_chains(framework):
    """With continuous numbers, AlphaFold-Multimer's asym_id separates chains as our chain_id does."""
    p = cast(synthetic_problem(), "float32")
    end = int(np.flatnonzero(np.diff(p.chain_id))[0])
    atom14 = p.atom14.copy()
    atom14[end + 1, 0] = atom14[end, 2] + np.array([1.33, 0, 0], np.float32)
    p = p._replace(atom14=atom14)

    def theirs(p):
        found = alphafold().all_atom_multimer.between_residue_clash_loss(
            alphafold().geometry.Vec3Array.from_array(p.atom14),
            p.exists.astype(np.float32),
            residues.ATOM14_RADIUS[p.aatype].astype(np.float32),
            p.residue_index,
            p.chain_id,
        )
        return [found[name] for name in ("mean_loss", "per_atom_loss_sum", "per_atom_clash_mask")]

    expected = as_alphafold(theirs, p, "float32")
    assert_close(framework.call(with_chains(clashes), p), expected, 1e-4)
    without = framework.call(clashes, p)
    assert np.abs(without[1] - expected[1]).max() > 0.1


def test_disulfides_and_prolines(framework):
    """Two sulfurs 1.7 Å apart are bonded, a C at the same distance clashes; a bond to proline may be longer."""
    cysteine, proline = residues.RESTYPES.index("C"), residues.RESTYPES.index("P")
    p = synthetic_problem()
    atom14 = 200.0 * np.arange(2)[:, None, None] + 6.0 * np.arange(14)[None, :, None] + np.zeros(3)
    index = np.array([0, 5], np.int32)
    q = p._replace(aatype=np.array([cysteine] * 2, np.int32), residue_index=index, chain_id=index * 0)
    q = q._replace(exists=residues.ATOM14_MASK[q.aatype])

    def clash(slot, other):
        moved = atom14.copy()
        moved[1, other] = moved[0, slot] + [1.7, 0, 0]
        return framework.call(clashes, q._replace(atom14=moved))[0]

    assert clash(5, 5) == 0
    assert clash(5, 4) > 0
    assert clash(2, 0) > 0
    assert framework.call(clashes, q._replace(residue_index=np.array([0, 1], np.int32), atom14=atom14))[0] == 0

    def bond(aatype, length):
        moved = atom14.copy()
        moved[1, 0] = moved[0, 2] + [length, 0, 0]
        x = q._replace(aatype=np.array([0, aatype], np.int32), residue_index=np.array([4, 5], np.int32), atom14=moved)
        return framework.call(bonds, x)[0]

    assert bond(0, 1.329 + 0.18) > 0
    assert bond(proline, 1.329 + 0.18) == 0
