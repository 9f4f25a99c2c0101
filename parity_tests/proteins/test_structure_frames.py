"""Frames of a structure: Algorithm 21, the model's unit, and the warning about a wrong unit."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipa_bridge.checks import warn_if_in_angstroms
from ipa_bridge.config import (
    IPABlockConfig,
    IPAConfig,
    IPATransformerConfig,
    PredictedLDDTConfig,
    StructureModuleConfig,
)
from ipa_bridge.proteins import load_structure
from ipa_bridge.proteins.frames import (
    backbone_frames,
    idealised_peptide,
    random_frames,
    random_rotations,
)
from ipa_bridge.proteins.residues import UNKNOWN_AATYPE

pytest.importorskip("gemmi", reason="structures are read by gemmi")
from small_files import POSITIONS

CONFIGS = {
    "attention": (IPAConfig.alphafold2(), 10.0),
    "multimer": (IPAConfig.alphafold_multimer(), 20.0),
    "Å": (IPAConfig.framediff(), 1.0),
    "block": (IPABlockConfig(ipa=IPAConfig.esmfold()), 10.0),
    "transformer": (IPATransformerConfig(block=IPABlockConfig(ipa=IPAConfig.esmfold()), num_layer=1), 10.0),
    "structure module": (StructureModuleConfig.alphafold_multimer(), 1.0),
}


@pytest.mark.parametrize(("config", "unit"), CONFIGS.values(), ids=CONFIGS)
def test_frames_come_in_the_unit_of_a_config(config, unit):
    structure = idealised_peptide()
    rotation, translation = structure.rigids(config)
    np.testing.assert_array_equal(rotation, structure.rotation)
    np.testing.assert_allclose(translation * unit, structure.translation, rtol=1e-15)
    steps = np.linalg.norm(np.diff(translation, axis=0), axis=-1)
    np.testing.assert_allclose(steps, 3.8 / unit, rtol=0.01)


UNKNOWN = {
    "attention": IPAConfig.lucidrains(64),
    "block": IPABlockConfig.lucidrains(64),
    "transformer": IPATransformerConfig.lucidrains(64, depth=2),
}


@pytest.mark.parametrize("config", UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_unit_raises_with_the_remedy(config):
    structure = idealised_peptide()
    with pytest.raises(ValueError, match=r"config\.frame_unit is None.*dataclasses\.replace") as caught:
        structure.rigids(config)
    mend = re.search(r"config = (.*)$", str(caught.value))[1]
    mended = eval(mend, {"dataclasses": dataclasses, "config": config})
    np.testing.assert_array_equal(structure.rigids(mended)[1], structure.translation / 10)


def test_configs_without_frames_raise():
    with pytest.raises(ValueError, match="which takes frames was expected; got PredictedLDDTConfig"):
        idealised_peptide().rigids(PredictedLDDTConfig())


IN_ANGSTROMS = r"in units of 10 Å.*median of 3\.8 units apart.*dataclasses\.replace\(config, frame_unit=1\.0\)"


def frames_in_angstroms(residues: int = 42) -> tuple[np.ndarray, np.ndarray]:
    """Frames of a peptide in Å, centred, and their mask."""
    return idealised_peptide().translation[10 : 10 + residues], np.ones(42, bool)[10 : 10 + residues]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("residues", [8, 30])
def test_a_chain_in_angstroms_is_warned_of_where_ten_are_a_unit(residues, dtype):
    translation, mask = frames_in_angstroms(residues)
    for valid in (None, mask, mask.astype(np.int32)):
        with pytest.warns(UserWarning, match=IN_ANGSTROMS):
            warn_if_in_angstroms(IPAConfig.alphafold2(), translation.astype(dtype), valid)
    with pytest.warns(UserWarning, match="in units of 20 Å"):
        warn_if_in_angstroms(IPAConfig.alphafold_multimer(), np.stack([translation, translation]).astype(dtype), None)


def test_chain_breaks_and_masked_residues_do_not_hide_it():
    translation, mask = frames_in_angstroms(30)
    translation[15:] += 50.0
    translation[5], mask[5] = 0.0, False
    with pytest.warns(UserWarning, match=IN_ANGSTROMS):
        warn_if_in_angstroms(IPAConfig.alphafold2(), translation, mask)


@pytest.mark.parametrize("what", ["unit unknown", "unit of 1 Å", "divided", "seven residues", "no neighbours", "noise"])
def test_nothing_else_is_warned_of(what):
    config = IPAConfig.alphafold2()
    translation, mask = frames_in_angstroms(7 if what == "seven residues" else 30)
    if what.startswith("unit"):
        config = dataclasses.replace(config, frame_unit=None if what == "unit unknown" else 1.0)
    elif what == "divided":
        translation = translation / 10
    elif what == "no neighbours":
        mask = np.arange(30) % 2 == 0
    elif what == "noise":  # random frames whose median step is also a Cα–Cα distance
        translation = random_frames(np.random.default_rng(0), (200,), spread=2.9)[1]
        assert 3.6 < np.median(np.linalg.norm(np.diff(translation, axis=0), axis=-1)) < 4.0
        mask = np.ones(200, bool)
    warn_if_in_angstroms(config, translation, mask)


def test_nucleic_acids_in_angstroms_are_not_detected():
    """This is the documented limit: phosphates or C1' of an A-form strand lie 5 to 7 Å apart."""
    turn, rise, radius = np.deg2rad(32.7) * np.arange(20), 2.81 * np.arange(20), 8.7
    strand = np.stack([radius * np.cos(turn), radius * np.sin(turn), rise], -1)
    assert 5 < np.linalg.norm(strand[1] - strand[0]) < 7
    warn_if_in_angstroms(IPAConfig.alphafold2(), strand, None)


# Algorithm 21


def local(rotation: np.ndarray, translation: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.einsum("...yx,...y->...x", rotation, x - translation)


@given(st.integers(0, 2**32 - 1))
def test_atoms_lie_where_algorithm_21_puts_them(seed):
    n, ca, c = np.random.default_rng(seed).normal(scale=5.0, size=(3, 4, 5, 3))
    rotation, translation = backbone_frames(n, ca, c)
    identity = np.einsum("...xi,...xj->...ij", rotation, rotation)
    np.testing.assert_allclose(identity, np.broadcast_to(np.eye(3), identity.shape), rtol=0, atol=1e-11)
    np.testing.assert_allclose(np.linalg.det(rotation), 1.0, rtol=0, atol=1e-11)
    np.testing.assert_array_equal(translation, ca)
    c_local, n_local = local(rotation, translation, c), local(rotation, translation, n)
    along = np.linalg.norm(c - ca, axis=-1)
    np.testing.assert_allclose(c_local, np.stack([along, 0 * along, 0 * along], -1), rtol=0, atol=1e-11)
    np.testing.assert_allclose(n_local[..., 2], 0.0, rtol=0, atol=1e-11)
    assert (n_local[..., 1] > 0).all()


@given(st.integers(0, 2**32 - 1))
def test_frames_move_with_the_molecule(seed):
    rng = np.random.default_rng(seed)
    motion, shift = random_rotations(rng), rng.normal(scale=50.0, size=3)
    atoms = np.moveaxis(POSITIONS, 1, 0)
    rotation, translation = backbone_frames(*atoms)
    moved_rotation, moved_translation = backbone_frames(*(atoms @ motion.T + shift))
    np.testing.assert_allclose(moved_rotation, motion @ rotation, rtol=0, atol=1e-12)
    np.testing.assert_allclose(moved_translation, translation @ motion.T + shift, rtol=0, atol=1e-12)


def test_frames_build_back_the_atoms():
    rotation, translation = random_frames(np.random.default_rng(5), (7,))
    placed = [translation + rotation @ np.array(x) for x in ([-0.5, 1.4, 0.0], [0.0, 0.0, 0.0], [1.5, 0.0, 0.0])]
    back_rotation, back_translation = backbone_frames(*placed)
    np.testing.assert_allclose(back_rotation, rotation, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(back_translation, translation)


def test_float32_atoms_give_float64_frames():
    rotation, translation = backbone_frames(*np.moveaxis(POSITIONS, 1, 0).astype(np.float32))
    assert rotation.dtype == translation.dtype == np.float64
    np.testing.assert_allclose(np.swapaxes(rotation, -1, -2) @ rotation, np.tile(np.eye(3), (12, 1, 1)), atol=1e-14)


def test_no_frame_is_the_identity():
    n, ca, c = (atoms.copy() for atoms in np.moveaxis(POSITIONS, 1, 0))
    n[0], c[1], ca[2], n[3], c[4], n[5] = np.nan, np.nan, np.nan, ca[3], ca[4], 2 * ca[5] - c[5]
    rotation, translation = backbone_frames(n, ca, c)
    np.testing.assert_array_equal(rotation[:6], np.tile(np.eye(3), (6, 1, 1)))
    np.testing.assert_array_equal(translation[:6], 0.0)
    np.testing.assert_array_equal(translation[6:], ca[6:])
    assert UNKNOWN_AATYPE == 20


def test_a_structure_prints_in_a_line(structures_dir):
    shown = repr(load_structure(structures_dir / "1gcn.pdb"))
    assert shown == "Structure('1gcn.pdb': 29 residues in 1 chain, 29 with a backbone frame)"
