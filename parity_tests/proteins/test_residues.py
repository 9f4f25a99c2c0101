"""The amino acids' tables are AlphaFold's, value by value."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from ipa_bridge.proteins import residues


@pytest.fixture(scope="module")
def alphafold():
    return pytest.importorskip("alphafold.common.residue_constants")


def test_names(alphafold):
    assert tuple(alphafold.restypes) == tuple(residues.RESTYPES)
    assert tuple(alphafold.atom_types) == residues.ATOM_TYPES
    assert tuple(alphafold.resnames) == residues.RESTYPE_NAMES
    for aatype, name in enumerate(residues.RESTYPE_NAMES):
        assert tuple(alphafold.restype_name_to_atom14_names[name]) == residues.ATOM14_NAMES[aatype]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("ATOM14_MASK", "restype_atom14_mask"),
        ("ATOM37_MASK", "restype_atom37_mask"),
        ("ATOM14_GROUP", "restype_atom14_to_rigid_group"),
        ("ATOM14_POSITIONS", "restype_atom14_rigid_group_positions"),
        ("CHI_PI_PERIODIC", "chi_pi_periodic"),
    ],
)
def test_tables_are_alphafolds(ours, theirs, alphafold):
    expected = np.array(getattr(alphafold, theirs))
    actual = getattr(residues, ours)
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(actual.astype(expected.dtype), expected)


def test_default_frames_are_alphafolds(alphafold):
    expected = alphafold.restype_rigid_group_default_frame
    np.testing.assert_allclose(residues.GROUP_TRANSLATION, expected[..., :3, 3], atol=1e-7)
    exists = np.abs(expected[..., :3, :3]).sum((-1, -2)) > 0
    np.testing.assert_allclose(residues.GROUP_ROTATION[exists], expected[exists][..., :3, :3], atol=1e-6)
    np.testing.assert_array_equal(residues.GROUP_ROTATION[~exists], np.broadcast_to(np.eye(3), ((~exists).sum(), 3, 3)))
    assert not residues.GROUP_MASK[~exists].any() or set(np.argwhere(residues.GROUP_MASK & ~exists)[:, 0]) == {20}


def test_chis_are_alphafolds(alphafold):
    np.testing.assert_array_equal(residues.CHI_MASK[:20].astype(float), alphafold.chi_angles_mask)
    np.testing.assert_array_equal(residues.CHI_ATOMS[:20], alphafold.chi_angles_atom_indices)
    assert not residues.CHI_MASK[20].any()


def test_maps_between_atom14_and_atom37_are_inverse():
    for aatype in range(20):
        slots = np.flatnonzero(residues.ATOM14_MASK[aatype])
        there = residues.ATOM14_TO_ATOM37[aatype, slots]
        np.testing.assert_array_equal(residues.ATOM37_TO_ATOM14[aatype, there], slots)
        assert [residues.ATOM_TYPES[i] for i in there] == [residues.ATOM14_NAMES[aatype][i] for i in slots]


def test_group_atoms_and_ambiguities_are_alphafolds(alphafold):
    multimer = pytest.importorskip("alphafold.model.all_atom_multimer")
    np.testing.assert_array_equal(residues.GROUP_ATOMS, multimer.RESTYPE_RIGIDGROUP_BASE_ATOM37_IDX)
    np.testing.assert_array_equal(residues.ATOM14_IS_AMBIGUOUS.astype(float), multimer.RESTYPE_ATOM14_IS_AMBIGUOUS)
    matrices = np.asarray(multimer.RENAMING_MATRICES)
    np.testing.assert_array_equal(matrices.argmax(-1), residues.ATOM14_SWAP)
    ambiguous = {residues.RESTYPE_NAMES[a] for a, _ in np.argwhere(residues.GROUP_IS_AMBIGUOUS)}
    assert ambiguous == set(alphafold.residue_atom_renaming_swaps)
    for aatype, group in np.argwhere(residues.GROUP_IS_AMBIGUOUS):
        assert residues.CHI_PI_PERIODIC[aatype, group - 4]


def test_stereochemistry_is_alphafolds(alphafold):
    assert residues.VAN_DER_WAALS_RADIUS == alphafold.van_der_waals_radius
    assert residues.CA_CA_DISTANCE == alphafold.ca_ca
    assert list(residues.PEPTIDE_BOND_LENGTH["mean"]) == alphafold.between_res_bond_length_c_n
    assert list(residues.PEPTIDE_BOND_LENGTH["stddev"]) == alphafold.between_res_bond_length_stddev_c_n
    assert list(residues.PEPTIDE_BOND_COSINES["CA-C-N"]) == alphafold.between_res_cos_angles_ca_c_n
    assert list(residues.PEPTIDE_BOND_COSINES["C-N-CA"]) == alphafold.between_res_cos_angles_c_n_ca


@pytest.mark.parametrize(("bonds", "overlap"), [(12.0, 1.5), (15, 1.3), (0, 0.4)])
def test_distance_bounds_are_alphafolds(bonds, overlap, alphafold):
    expected = alphafold.make_atom14_dists_bounds(overlap_tolerance=overlap, bond_length_tolerance_factor=bonds)
    lower, upper = residues.atom14_distance_bounds(bond_length_tolerance=bonds, overlap_tolerance=overlap)
    np.testing.assert_allclose(lower, expected["lower_bound"], rtol=1e-6)
    np.testing.assert_allclose(upper, expected["upper_bound"], rtol=1e-6)


def test_tables_are_read_only():
    """This runs in a process of its own, because torch.compile leaves traced arrays writable."""
    code = "from ipa_bridge.proteins import residues; residues.ATOM14_POSITIONS[0, 0] = 0"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "read-only" in run.stderr
