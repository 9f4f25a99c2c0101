"""Real structure files are read as other readers read them."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from ipa_bridge.proteins import load_structure
from ipa_bridge.proteins.frames import (
    backbone_frames,
)
from ipa_bridge.proteins.residues import ATOM37_MASK, ATOM_TYPES, RESTYPES

pytest.importorskip("gemmi", reason="structures are read by gemmi")
from small_files import assert_same, written

RESIDUES = {
    "1gcn.pdb": {"A": 29},
    "2rbg.pdb": {"A": 124, "B": 124},
    "5nmu.pdb": dict.fromkeys("BCDEFG", 208),
    "3u8v.cif": {"A": 83, "B": 83},
    "3zee.cif": {"A": 84},
    "4zey.cif": {"A": 84},
}
"""Number of observed residues per chain; all have a full backbone."""

PDB_FILES = [name for name in RESIDUES if name.endswith(".pdb")]


def biopython_residues(path: Path) -> list:
    parsers = pytest.importorskip("Bio.PDB", reason="Biopython is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parser = parsers.PDBParser(QUIET=True) if path.suffix == ".pdb" else parsers.MMCIFParser(QUIET=True)
        model = next(iter(parser.get_structure(path.name, path)))
    return [(c.id, r) for c in model for r in c if r.id[0] == " " or r.resname == "MSE"]


@pytest.mark.parametrize("name", RESIDUES)
def test_types_and_numbers_of_residues(structures_dir, name):
    structure = load_structure(structures_dir / name)
    n = sum(RESIDUES[name].values())
    chains, counts = np.unique(structure.chain_id, return_counts=True)
    assert dict(zip(chains, counts, strict=True)) == RESIDUES[name]
    assert len(structure) == len(structure.sequence) == n
    assert structure.mask.all()
    assert structure.name == name
    shapes = {"rotation": (n, 3, 3), "translation": (n, 3), "mask": (n,), "aatype": (n,), "residue_number": (n,)}
    shapes |= {"atom37": (n, 37, 3), "atom37_mask": (n, 37)}
    dtypes = {"rotation": "f8", "translation": "f8", "mask": "?", "aatype": "i8", "residue_number": "i8"}
    dtypes |= {"atom37": "f8", "atom37_mask": "?"}
    assert {field: getattr(structure, field).shape for field in shapes} == shapes
    assert {field: getattr(structure, field).dtype.str[1:].replace("b1", "?") for field in dtypes} == dtypes
    assert structure.chain_id.dtype.kind == structure.insertion_code.dtype.kind == "U"


@pytest.mark.parametrize("name", RESIDUES)
def test_biopython_reads_the_same(structures_dir, name):
    letters = pytest.importorskip("Bio.Data.PDBData", reason="Biopython is not installed").protein_letters_3to1_extended

    structure = load_structure(structures_dir / name)
    residues = biopython_residues(structures_dir / name)
    assert structure.sequence == "".join({**letters, "MSE": "M"}[r.resname] for _, r in residues)
    assert structure.chain_id.tolist() == [chain for chain, _ in residues]
    assert structure.residue_number.tolist() == [r.id[1] for _, r in residues]
    assert structure.insertion_code.tolist() == [r.id[2].strip() for _, r in residues]
    # Biopython keeps float32; PDB coordinates have three decimals.
    n, ca, c = (np.round([r[atom].coord.astype(np.float64) for _, r in residues], 3) for atom in ("N", "CA", "C"))
    rotation, translation = backbone_frames(n, ca, c)
    np.testing.assert_array_equal(structure.translation, translation)
    np.testing.assert_allclose(structure.rotation, rotation, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", RESIDUES)
def test_biopython_finds_the_same_atoms(structures_dir, name):
    structure = load_structure(structures_dir / name)
    for i, (_, theirs) in enumerate(biopython_residues(structures_dir / name)):
        atoms = {"SD" if atom.id == "SE" else atom.id: atom.coord for atom in theirs if atom.element not in "HD"}
        nitrogens = ["NH1", "NH2"] if {"CD", "NH1", "NH2"} <= set(atoms) else []
        nearest = sorted(nitrogens, key=lambda x, atoms=atoms: np.linalg.norm(atoms[x] - atoms["CD"]))
        atoms |= dict(zip(nitrogens, [atoms[x] for x in nearest], strict=True))
        assert {ATOM_TYPES[slot] for slot in np.flatnonzero(structure.atom37_mask[i])} == set(atoms)
        for atom, position in atoms.items():
            theirs_rounded = np.round(position.astype(np.float64), 3)
            np.testing.assert_array_equal(structure.atom37[i, ATOM_TYPES.index(atom)], theirs_rounded, err_msg=atom)


@pytest.mark.parametrize("name", RESIDUES)
def test_absent_atoms_are_zero_and_no_other_is(structures_dir, name):
    structure = load_structure(structures_dir / name)
    np.testing.assert_array_equal(structure.atom37.any(-1), structure.atom37_mask)
    assert not (structure.atom37_mask & ~ATOM37_MASK[structure.aatype])[:, : ATOM_TYPES.index("OXT")].any()
    frames = backbone_frames(*np.moveaxis(structure.atom37[:, :3], 1, 0))
    for ours, theirs in zip((structure.rotation, structure.translation), frames, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", PDB_FILES)
def test_alphafolds_pdb_reader_finds_the_same_atoms(structures_dir, name):
    protein = pytest.importorskip("alphafold.common.protein", reason="alphafold-colabfold is not installed")
    structure = load_structure(structures_dir / name)
    theirs = protein.from_pdb_string((structures_dir / name).read_text())
    kept = theirs.atom_mask[:, :3].all(-1)
    mask, positions = theirs.atom_mask[kept].astype(bool), np.round(theirs.atom_positions[kept].astype(np.float64), 3)
    # This reader knows neither selenium nor, unlike AlphaFold's mmCIF reader, wrong names in arginines.
    ours = structure.atom37_mask & ~((theirs.aatype[kept] == 20)[:, None] & (np.array(ATOM_TYPES) == "SD"))
    np.testing.assert_array_equal(ours, mask)
    cd, nh1, nh2 = (ATOM_TYPES.index(x) for x in ("CD", "NH1", "NH2"))
    wrong = np.linalg.norm(positions[:, nh1] - positions[:, cd], axis=-1)
    wrong = mask[:, [cd, nh1, nh2]].all(-1) & (wrong > np.linalg.norm(positions[:, nh2] - positions[:, cd], axis=-1))
    positions[wrong, nh1], positions[wrong, nh2] = positions[wrong, nh2], positions[wrong, nh1]
    np.testing.assert_array_equal(structure.atom37[ours], positions[mask])


@pytest.mark.parametrize("name", [name for name in RESIDUES if name.endswith(".cif")])
def test_alphafolds_mmcif_reader_finds_the_same_atoms(structures_dir, name):
    """Selenomethionine and arginine's names included."""
    reason = "alphafold-colabfold is not installed"
    mmcif_parsing = pytest.importorskip("alphafold.data.mmcif_parsing", reason=reason)
    templates = pytest.importorskip("alphafold.data.templates", reason=reason)
    structure = load_structure(structures_dir / name)
    parsed = mmcif_parsing.parse(file_id=name, mmcif_string=(structures_dir / name).read_text()).mmcif_object
    assert set(parsed.chain_to_seqres) == set(structure.chain_id)
    for chain in parsed.chain_to_seqres:
        positions, mask = templates._get_atom_positions(parsed, chain, max_ca_ca_distance=150.0)
        observed = mask.any(-1)
        ours = structure.chain_id == chain
        np.testing.assert_array_equal(structure.atom37_mask[ours], mask[observed].astype(bool))
        np.testing.assert_array_equal(structure.atom37[ours], np.round(positions[observed], 3))


@pytest.mark.parametrize("name", PDB_FILES)
def test_alphafold_reads_the_same(structures_dir, name):
    protein = pytest.importorskip("alphafold.common.protein", reason="alphafold-colabfold is not installed")
    quat_affine = pytest.importorskip("alphafold.model.quat_affine", reason="alphafold-colabfold is not installed")
    structure = load_structure(structures_dir / name)
    theirs = protein.from_pdb_string((structures_dir / name).read_text())
    # N, CA and C are atoms 0, 1 and 2 of atom37; waters and ligands have none of them.
    kept = theirs.atom_mask[:, :3].all(-1)
    aatype, positions = theirs.aatype[kept], np.round(theirs.atom_positions[kept, :3].astype(np.float64), 3)
    # To this reader, unlike AlphaFold's mmCIF reader, selenomethionine is unknown.
    np.testing.assert_array_equal(structure.aatype, np.where(aatype == 20, RESTYPES.index("M"), aatype))
    assert (aatype == 20).sum() == {"2rbg.pdb": 2}.get(name, 0)
    np.testing.assert_array_equal(structure.residue_number, theirs.residue_index[kept])
    np.testing.assert_array_equal(np.unique(structure.chain_id)[theirs.chain_index[kept]], structure.chain_id)
    np.testing.assert_array_equal(structure.translation, positions[:, 1])
    n, ca, c = np.moveaxis(positions, 1, 0)
    rotation, _ = quat_affine.make_transform_from_reference(n, ca, c)
    # AlphaFold's float32 formula has an ε of 1e-20 under its roots and rounds at every step.
    np.testing.assert_allclose(structure.rotation, np.asarray(rotation), rtol=0, atol=3e-6)


@pytest.mark.parametrize("name", PDB_FILES)
def test_atom_lines_alone_are_enough(structures_dir, name, tmp_path):
    """Files without TER, SEQRES and MODRES, which mark ligands, waters and modified residues, are read the same."""
    lines = (structures_dir / name).read_text().splitlines(keepends=True)
    bare = written(tmp_path, "".join(line for line in lines if line.startswith(("ATOM", "HETATM"))))
    assert_same(load_structure(bare), load_structure(structures_dir / name))


@pytest.mark.parametrize("name", ["2rbg.pdb", "4zey.cif"])
def test_either_format_gives_the_same(structures_dir, name, tmp_path):
    import gemmi

    structure = gemmi.read_structure(str(structures_dir / name))
    structure.setup_entities()
    structure.write_pdb(str(tmp_path / "copy.pdb"))
    structure.make_mmcif_document().write_file(str(tmp_path / "copy.cif"))
    original = load_structure(structures_dir / name)
    assert_same(load_structure(tmp_path / "copy.pdb"), original)
    assert_same(load_structure(tmp_path / "copy.cif"), original)
