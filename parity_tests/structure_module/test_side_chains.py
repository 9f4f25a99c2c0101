"""Torsions to rigid groups to atoms and back: against the oracle, AlphaFold's functions, and real proteins."""

from __future__ import annotations

import numpy as np
import pytest

from ipa_bridge import oracle
from ipa_bridge.proteins import load_structure, residues
from ipa_bridge.proteins.frames import random_frames
from ipa_parity.report import compare

RMSD = {"1gcn.pdb": 0.284, "2rbg.pdb": 0.148, "5nmu.pdb": 0.002}
"""RMSD in Å of rebuilt proteins, caused by ideal bonds and angles; 5nmu.pdb, a prediction, already has ideal ones."""

PROTEINS = tuple(RMSD)


def drawn(shape, seed=0, dtype="float64"):
    """Random frames and unit angles for every residue type."""
    rng = np.random.default_rng(seed)
    rotation, translation = random_frames(rng, shape)
    angles = rng.standard_normal((*shape, 7, 2))
    angles /= np.linalg.norm(angles, axis=-1, keepdims=True)
    aatype = np.resize(np.arange(21), shape)
    return *(x.astype(dtype) for x in (rotation, translation, angles)), aatype


def judge(actual, expected, stage, dtype, reference="oracle", conditioning=1.0):
    names = {"case": "side chains", "stage": stage, "dtype": dtype, "subject": "ours", "reference": reference}
    row = compare(actual, expected, **names, conditioning=conditioning)
    assert row.passed, str(row)


def spread(atoms):
    """Ratio of coordinates to bond lengths, by which torsions lose accuracy in coordinate differences."""
    return 1 + np.abs(atoms).max() / 1.5


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(21,), (2, 3, 42), (0,)])
def test_atoms_are_the_oracles(framework, shape, dtype):
    rotation, translation, angles, aatype = drawn(shape, dtype=dtype)
    rigids = framework.geometry.Rigid(framework.array(rotation), framework.array(translation))
    frames = framework.geometry.torsion_angles_to_frames(rigids, framework.array(angles), framework.array(aatype))
    atoms = framework.numpy(framework.geometry.frames_to_atom14(frames, framework.array(aatype)))
    assert atoms.dtype == dtype
    expected_rotation, expected_translation = oracle.rigid_groups(rotation, translation, angles, aatype)
    expected = oracle.atom14(expected_rotation, expected_translation, aatype)
    assert atoms.shape == expected.shape
    if atoms.size:
        judge(framework.numpy(frames.rotation), expected_rotation, "rotation", dtype)
        judge(framework.numpy(frames.translation), expected_translation, "translation", dtype)
        judge(atoms, expected, "atom14", dtype)


@pytest.mark.parametrize("transform", ["jit", "vmap"])
def test_transforms(framework, transform):
    rotation, translation, angles, aatype = (framework.array(x) for x in drawn((3, 21)))

    def build(rotation, translation, angles, aatype):
        frames = framework.geometry.torsion_angles_to_frames(
            framework.geometry.Rigid(rotation, translation), angles, aatype
        )
        atoms = framework.geometry.atom14_to_atom37(framework.geometry.frames_to_atom14(frames, aatype), aatype)
        mask = framework.geometry.atom14_to_atom37(
            framework.geometry.frames_to_atom14(frames, aatype)[..., 0] != 0, aatype
        )
        return framework.geometry.atom37_to_torsion_angles(atoms, mask, aatype).angles

    arguments = (rotation, translation, angles, aatype)
    expected = framework.numpy(build(*arguments))
    actual = framework.numpy(getattr(framework, transform)(build)(*arguments))
    judge(actual, expected, "angles", "float64", "plain", spread(framework.numpy(translation)))


def test_angles_come_back(framework):
    """Only ψ and the χs come back, because φ and pre-ω depend on atoms of the previous residue."""
    rotation, translation, angles, aatype = drawn((42,))
    atoms = oracle.atom14(*oracle.rigid_groups(rotation, translation, angles, aatype), aatype)
    atoms, aatype = framework.array(atoms), framework.array(aatype)
    atom37 = framework.geometry.atom14_to_atom37(atoms, aatype)
    mask = framework.array(residues.ATOM37_MASK[framework.numpy(aatype)])
    found = framework.geometry.atom37_to_torsion_angles(atom37, mask, aatype)
    own = framework.numpy(found.mask).copy()
    own[:, :2] = False
    np.testing.assert_array_equal(own[:, 3:], residues.CHI_MASK[framework.numpy(aatype)])
    judge(framework.numpy(found.angles)[own], angles[own], "angles", "float64", conditioning=spread(translation))
    frames = framework.geometry.atom37_to_frames(atom37, mask, aatype)
    expected, _ = oracle.rigid_groups(rotation, translation, angles, framework.numpy(aatype))
    known = framework.numpy(frames.mask)
    judge(framework.numpy(frames.frames.rotation)[known], expected[known], "rotation", "float64")


def test_atom_slots_go_both_ways(framework):
    aatype = np.arange(21)
    atoms = np.random.default_rng(0).standard_normal((21, 14, 3)) * residues.ATOM14_MASK[..., None]
    there = framework.geometry.atom14_to_atom37(framework.array(atoms), framework.array(aatype))
    np.testing.assert_array_equal(
        framework.numpy(framework.geometry.atom37_to_atom14(there, framework.array(aatype))), atoms
    )
    masks = framework.geometry.atom14_to_atom37(framework.array(residues.ATOM14_MASK), framework.array(aatype))
    np.testing.assert_array_equal(framework.numpy(masks), residues.ATOM37_MASK)


@pytest.mark.parametrize("name", PROTEINS[:2])
def test_frames_and_torsions_are_alphafolds(framework, name, structures_dir):
    """AlphaFold's tables are float32; undefined angles and frames are zero and the identity in ours."""
    pytest.importorskip("alphafold")
    jax = pytest.importorskip("jax")
    from alphafold.model import all_atom

    structure = load_structure(structures_dir / name)
    atoms, mask, aatype = structure.atom37.astype("float32"), structure.atom37_mask, structure.aatype
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        floats = mask.astype("float32")
        torsions = all_atom.atom37_to_torsion_angles(aatype[None], atoms[None], floats[None])
        frames = all_atom.atom37_to_frames(aatype, atoms, floats)
    torsions, frames = ({key: np.asarray(x) for key, x in found.items()} for found in (torsions, frames))
    arrays = [framework.array(x) for x in (atoms, mask, aatype)]
    ours = framework.geometry.atom37_to_torsion_angles(*arrays)
    known = framework.numpy(ours.mask)
    np.testing.assert_array_equal(known, torsions["torsion_angles_mask"][0] > 0)
    for field, key in (("angles", "torsion_angles_sin_cos"), ("alternative_angles", "alt_torsion_angles_sin_cos")):
        actual, expected = framework.numpy(getattr(ours, field))[known], torsions[key][0][known]
        judge(actual, expected, "angles", "float32", "AlphaFold", spread(atoms))
    groups = framework.geometry.atom37_to_frames(*arrays)
    known = framework.numpy(groups.mask)
    np.testing.assert_array_equal(known, frames["rigidgroups_gt_exists"] > 0)
    for field, key in (("frames", "rigidgroups_gt_frames"), ("alternative_frames", "rigidgroups_alt_gt_frames")):
        flat = frames[key][known]
        rigids = getattr(groups, field)
        rotation = framework.numpy(rigids.rotation)[known].reshape(-1, 9)
        judge(rotation, flat[:, :9], "rotation", "float32", "AlphaFold")
        judge(framework.numpy(rigids.translation)[known], flat[:, 9:], "translation", "float32", "AlphaFold")


@pytest.mark.parametrize("name", PROTEINS[:2])
def test_frames_and_torsions_are_alphafold_multimers(framework, name, structures_dir):
    """AlphaFold-Multimer has its own functions; it returns χ in radians, and alternative frames on request."""
    pytest.importorskip("alphafold")
    jax = pytest.importorskip("jax")
    from alphafold.model import all_atom_multimer, geometry

    structure = load_structure(structures_dir / name)
    atoms, mask, aatype = structure.atom37.astype("float32"), structure.atom37_mask, structure.aatype
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        vectors, floats = geometry.Vec3Array.from_array(atoms), mask.astype("float32")
        chi, chi_mask = all_atom_multimer.compute_chi_angles(vectors, floats, aatype)
        frames = all_atom_multimer.atom37_to_frames(aatype, vectors, floats)
        fields = ("frames", "alternative_frames")
        keys = ("rigidgroups_gt_frames", "rigidgroups_alt_gt_frames")
        theirs = {field: np.asarray(frames[key].to_array()) for field, key in zip(fields, keys, strict=True)}
    arrays = [framework.array(x) for x in (atoms, mask, aatype)]
    ours = framework.geometry.atom37_to_torsion_angles(*arrays)
    known = framework.numpy(ours.mask)[:, 3:]
    np.testing.assert_array_equal(known, np.asarray(chi_mask) > 0)
    expected = np.stack([np.sin(chi), np.cos(chi)], -1)[known]
    judge(framework.numpy(ours.angles)[:, 3:][known], expected, "angles", "float32", "AlphaFold", spread(atoms))
    groups = framework.geometry.atom37_to_frames(*arrays)
    known = framework.numpy(groups.mask)
    np.testing.assert_array_equal(known, np.asarray(frames["rigidgroups_gt_exists"]) > 0)
    for field, expected in theirs.items():
        rigids = getattr(groups, field)
        judge(framework.numpy(rigids.rotation)[known], expected[known][..., :3], "rotation", "float32", "AlphaFold")
        translation = framework.numpy(rigids.translation)[known]
        judge(translation, expected[known][..., 3], "translation", "float32", "AlphaFold")


@pytest.mark.parametrize("name", PROTEINS)
def test_real_proteins_are_rebuilt_from_frames_and_torsions(framework, name, structures_dir):
    """Errors come from ideal bond lengths and angles only; missing atoms are left out."""
    structure = load_structure(structures_dir / name)
    atoms, mask, aatype = (framework.array(x) for x in (structure.atom37, structure.atom37_mask, structure.aatype))
    torsions = framework.geometry.atom37_to_torsion_angles(atoms, mask, aatype)
    known = framework.numpy(torsions.mask)
    at_zero = np.where(known[..., None], framework.numpy(torsions.angles), [0.0, 1.0])
    rigids = framework.geometry.Rigid(framework.array(structure.rotation), framework.array(structure.translation))
    frames = framework.geometry.torsion_angles_to_frames(rigids, framework.array(at_zero), aatype)
    built = framework.numpy(
        framework.geometry.atom14_to_atom37(framework.geometry.frames_to_atom14(frames, aatype), aatype)
    )
    assert np.isfinite(built).all()
    assert rmsd(structure, built, known) == pytest.approx(RMSD[name], abs=0.001)


def rmsd(structure, built, torsion_known):
    """RMSD in Å over the atoms that exist and whose torsions are known."""
    groups = np.concatenate([np.ones((len(structure), 1), bool), torsion_known], -1)
    whole = np.take_along_axis(groups, residues.ATOM14_GROUP[structure.aatype], -1)
    compared = in_atom37(whole[..., None], structure.aatype)[..., 0] & structure.atom37_mask & structure.mask[:, None]
    assert compared.sum() > 0.95 * structure.atom37_mask.sum() - 3 * len(structure)
    error = np.linalg.norm(built - structure.atom37, axis=-1)[compared]
    return np.sqrt((error**2).mean())


def in_atom37(atom14, aatype):
    found = np.take_along_axis(atom14, residues.ATOM37_TO_ATOM14[aatype][..., None], -2)
    return np.where(residues.ATOM37_MASK[aatype][..., None], found, 0).astype(atom14.dtype)


@pytest.mark.parametrize("name", PROTEINS[:2])
def test_alphafold_rebuilds_real_proteins_no_better(name, structures_dir):
    """AlphaFold's own torsions, frames and tables give the reference values of the RMSDs."""
    pytest.importorskip("alphafold")
    jax = pytest.importorskip("jax")
    from alphafold.model import all_atom, r3

    structure = load_structure(structures_dir / name)
    atoms, mask, aatype = structure.atom37.astype("float32"), structure.atom37_mask, structure.aatype
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        floats = mask.astype("float32")
        torsions = all_atom.atom37_to_torsion_angles(aatype[None], atoms[None], floats[None])
        frames = all_atom.atom37_to_frames(aatype, atoms, floats)["rigidgroups_gt_frames"][:, 0]
        known = np.asarray(torsions["torsion_angles_mask"][0]) > 0
        angles = np.where(known[..., None], torsions["torsion_angles_sin_cos"][0], np.array([0, 1], "float32"))
        groups = all_atom.torsion_angles_to_frames(aatype, r3.rigids_from_tensor_flat12(frames), angles)
        built = all_atom.frames_and_literature_positions_to_atom14_pos(aatype, groups)
        built = in_atom37(np.asarray(r3.vecs_to_tensor(built)), aatype)
    assert rmsd(structure, built, known) == pytest.approx(RMSD[name], abs=0.001)


def test_rebuilt_atoms_are_alphafolds(framework, structures_dir):
    """Both of AlphaFold's versions rebuild the same atoms from the same frames and torsions, in float32."""
    pytest.importorskip("alphafold")
    jax = pytest.importorskip("jax")
    from alphafold.model import all_atom, all_atom_multimer, geometry, r3

    structure = load_structure(structures_dir / "1gcn.pdb")
    rotation, translation, angles, _ = drawn((len(structure),), dtype="float32")
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        rigids = r3.Rigids(r3.rots_from_tensor3x3(rotation), r3.vecs_from_tensor(translation))
        groups = all_atom.torsion_angles_to_frames(structure.aatype, rigids, angles)
        theirs = all_atom.frames_and_literature_positions_to_atom14_pos(structure.aatype, groups)
        expected = np.asarray(r3.vecs_to_tensor(theirs))
        backbone = geometry.Rigid3Array.from_array(np.concatenate([rotation, translation[..., None]], -1))
        groups = all_atom_multimer.torsion_angles_to_frames(structure.aatype, backbone, angles)
        theirs = all_atom_multimer.frames_and_literature_positions_to_atom14_pos(structure.aatype, groups)
        of_multimer = np.asarray(theirs.to_array())
    arrays = [framework.array(x) for x in (rotation, translation, angles, structure.aatype)]
    frames = framework.geometry.torsion_angles_to_frames(framework.geometry.Rigid(*arrays[:2]), *arrays[2:])
    actual = framework.numpy(framework.geometry.frames_to_atom14(frames, arrays[3]))
    judge(actual, expected, "atom14", "float32", "AlphaFold")
    judge(actual, of_multimer, "atom14", "float32", "AlphaFold-Multimer")


def test_atoms_that_do_not_fit_the_sequence_are_refused(framework):
    """Atoms of all layers at once raise, and so does a batch axis that the sequence lacks."""
    aatype = framework.array(np.arange(14))
    atom14, atom37 = (framework.array(np.zeros((8, 14, slots, 3))) for slots in (14, 37))
    mask = framework.array(np.ones((8, 14, 37), bool))
    with pytest.raises(
        ValueError, match=r"atom14 must be \(14, 14\), or that and one axis more, to fit aatype \(14,\)"
    ):
        framework.geometry.atom14_to_atom37(atom14, aatype)
    with pytest.raises(ValueError, match="one axis more"):
        framework.geometry.atom14_to_atom37(framework.array(np.zeros((14, 14, 14, 3))), aatype)
    with pytest.raises(ValueError, match="atom37 must be"):
        framework.geometry.atom37_to_atom14(atom37, aatype)
    with pytest.raises(ValueError, match=r"atom37 must be \(14, 37, 3\) to fit aatype"):
        framework.geometry.atom37_to_frames(atom37, mask, aatype)
    with pytest.raises(ValueError, match="atom37_mask must be"):
        framework.geometry.atom37_to_torsion_angles(atom37[0], mask, aatype)
    identity = framework.geometry.Rigid.identity((8, 14, 8))
    with pytest.raises(ValueError, match=r"frames\.translation must be"):
        framework.geometry.frames_to_atom14(identity, aatype)


def test_unbonded_neighbours_have_no_common_torsions(framework, structures_dir):
    structure = load_structure(structures_dir / "2rbg.pdb")
    bonded = np.ones(len(structure), bool)
    bonded[5] = False
    arrays = [framework.array(x) for x in (structure.atom37, structure.atom37_mask, structure.aatype)]
    plain = framework.numpy(framework.geometry.atom37_to_torsion_angles(*arrays).mask)
    broken = framework.numpy(framework.geometry.atom37_to_torsion_angles(*arrays, bonded=framework.array(bonded)).mask)
    assert np.argwhere(plain != broken).tolist() == [[5, 0], [5, 1]]
    assert not plain[0, :2].any()


def test_gradients_are_finite_where_atoms_are_missing(framework):
    """This covers residues without atoms, glycine, alanine and coinciding atoms."""
    aatype = np.arange(21)
    atoms = np.zeros((21, 37, 3))
    atoms[1:3] = np.random.default_rng(0).standard_normal((2, 37, 3))
    mask = residues.ATOM37_MASK[aatype]
    aatype, mask = framework.array(aatype), framework.array(mask)

    def loss(atoms):
        frames = framework.geometry.atom37_to_frames(atoms, mask, aatype)
        angles = framework.geometry.atom37_to_torsion_angles(atoms, mask, aatype)
        return frames.frames.rotation.sum() + frames.alternative_frames.translation.sum() + angles.angles.sum()

    (gradient,) = framework.gradient(loss, framework.array(atoms))
    assert np.isfinite(gradient).all()
    rotation, translation, angles, aatypes = drawn((21,))
    of_all = framework.gradient(
        lambda r, t, a: framework.geometry.frames_to_atom14(
            framework.geometry.torsion_angles_to_frames(framework.geometry.Rigid(r, t), a, framework.array(aatypes)),
            framework.array(aatypes),
        ).sum(),
        *(framework.array(x) for x in (rotation, translation, angles)),
    )
    assert all(np.isfinite(x).all() for x in of_all)
    assert not of_all[2][7, 3:].any(), "glycine has no χ"
