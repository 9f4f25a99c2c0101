"""load_structure against AlphaFold's and Biopython's readers on real files, and on small files with one oddity each."""

from __future__ import annotations

import dataclasses
import gzip
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

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
from ipa_bridge.proteins import Structure, load_structure
from ipa_bridge.proteins.frames import (
    backbone_frames,
    build_backbone,
    idealised_peptide,
    random_frames,
    random_rotations,
)
from ipa_bridge.proteins.residues import ATOM37_MASK, ATOM_TYPES, RESTYPES, UNKNOWN_AATYPE

pytest.importorskip("gemmi", reason="structures are read by gemmi")

RESIDUES = {
    "1gcn.pdb": {"A": 29},
    "2rbg.pdb": {"A": 124, "B": 124},
    "5nmu.pdb": dict.fromkeys("BCDEFG", 208),
    "3u8v.cif": {"A": 83, "B": 83},
    "3zee.cif": {"A": 84},
    "4zey.cif": {"A": 84},
}
"""Observed residues per chain; all have a full backbone."""

PDB_FILES = [name for name in RESIDUES if name.endswith(".pdb")]

POSITIONS = np.round(np.stack(build_backbone([(-60.0, -45.0)] * 12), 1), 3)
"""(12, 3, 3): N, CA and C of a helix, with the decimals of a PDB file."""


class Atom(NamedTuple):
    name: str
    residue: str
    number: int
    xyz: tuple[float, float, float]
    chain: str = "A"
    icode: str = ""
    altloc: str = ""
    occupancy: float = 1.0
    het: bool = False
    model: int = 1


def residue(name: str, number: int, *, place: int | None = None, shift: float = 0.0, **fields) -> list[Atom]:
    """The backbone of a residue, where residue `place` (else `number`) of the helix stands."""
    atoms = zip(("N", "CA", "C"), POSITIONS[number if place is None else place] + shift, strict=True)
    return [Atom(atom, name, number, tuple(xyz), **fields) for atom, xyz in atoms]


def pdb(atoms: list[Atom], *, after: dict[int, str] | None = None) -> str:
    """The PDB file of these atoms; `after` puts a line behind the atom of that index."""
    lines: list[str] = []
    for i, a in enumerate(atoms):
        if a.model != (atoms[i - 1].model if i else 1):
            lines.append("ENDMDL")
        if a.model > 1 and lines[-1] == "ENDMDL":
            lines.append(f"MODEL     {a.model:4d}")
        name = a.name if len(a.name) == 4 else f" {a.name:<3}"
        x, y, z = a.xyz
        lines.append(
            f"{'HETATM' if a.het else 'ATOM  '}{i + 1:5d} {name}{a.altloc or ' '}{a.residue:>3} {a.chain:1}"
            f"{a.number:4d}{a.icode or ' '}   {x:8.3f}{y:8.3f}{z:8.3f}{a.occupancy:6.2f}{10.0:6.2f}"
            f"          {a.name[0]:>2}"
        )
        lines += [after[i]] if after and i in after else []
    return "\n".join([*lines, "END", ""])


def mmcif(atoms: list[Atom]) -> str:
    """The same as mmCIF, without a list of entities."""
    items = (
        "group_PDB id type_symbol label_atom_id label_alt_id label_comp_id label_asym_id label_seq_id Cartn_x Cartn_y "
        "Cartn_z occupancy auth_seq_id auth_asym_id pdbx_PDB_ins_code pdbx_PDB_model_num"
    )
    rows = [
        f"{'HETATM' if a.het else 'ATOM'} {i + 1} {a.name[0]} {a.name} {a.altloc or '.'} {a.residue} {a.chain} . "
        f"{a.xyz[0]:.3f} {a.xyz[1]:.3f} {a.xyz[2]:.3f} {a.occupancy:.2f} {a.number} {a.chain} {a.icode or '?'} "
        f"{a.model}"
        for i, a in enumerate(atoms)
    ]
    return "\n".join(["data_test", "loop_", *(f"_atom_site.{item}" for item in items.split()), *rows, ""])


@pytest.fixture(params=["pdb", "cif"])
def load(request, tmp_path):
    """Writes atoms in either format and loads them."""

    def write_and_load(atoms: list[Atom], **options) -> Structure:
        path = tmp_path / f"small.{request.param}"
        path.write_text(pdb(atoms) if request.param == "pdb" else mmcif(atoms))
        return load_structure(path, **options)

    return write_and_load


def written(tmp_path: Path, content: str | bytes, name: str = "small.pdb") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def assert_same(left: Structure, right: Structure) -> None:
    for field in (field.name for field in dataclasses.fields(Structure) if field.name != "name"):
        np.testing.assert_array_equal(getattr(left, field), getattr(right, field), err_msg=field, strict=True)


def biopython_residues(path: Path) -> list:
    parsers = pytest.importorskip("Bio.PDB", reason="Biopython is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parser = parsers.PDBParser(QUIET=True) if path.suffix == ".pdb" else parsers.MMCIFParser(QUIET=True)
        model = next(iter(parser.get_structure(path.name, path)))
    return [(c.id, r) for c in model for r in c if r.id[0] == " " or r.resname == "MSE"]


# Real files


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
    """No TER, SEQRES or MODRES to tell ligands, waters and modified residues apart."""
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


# Small files, one oddity each, in both formats


def test_frames_are_of_the_atoms_written(load):
    structure = load([*residue("GLY", 3), *residue("TRP", 4)])
    n, ca, c = np.moveaxis(POSITIONS[3:5], 1, 0)
    rotation, translation = backbone_frames(n, ca, c)
    np.testing.assert_array_equal(structure.rotation, rotation)
    np.testing.assert_array_equal(structure.translation, translation)
    assert structure.sequence == "GW"
    assert structure.aatype.tolist() == [RESTYPES.index("G"), RESTYPES.index("W")]


def test_highest_occupancy_wins_per_atom_and_the_first_of_equals(load):
    atoms = residue("ALA", 1)
    for name, occupancies in {"N": (0.3, 0.7), "CA": (0.5, 0.5), "C": (0.6, 0.4)}.items():
        (atom,) = (a for a in atoms if a.name == name)
        moved = atom._replace(xyz=tuple(np.round(np.array(atom.xyz) + 0.25, 3)), altloc="B", occupancy=occupancies[1])
        at = atoms.index(atom)
        atoms[at : at + 1] = [atom._replace(altloc="A", occupancy=occupancies[0]), moved]
    n, ca, c = POSITIONS[1]
    rotation, translation = backbone_frames(np.round(n + 0.25, 3), ca, c)
    structure = load(atoms)
    np.testing.assert_array_equal(structure.translation, [translation])
    np.testing.assert_allclose(structure.rotation, [rotation], rtol=0, atol=1e-14)


@pytest.mark.parametrize(("occupancies", "sequence"), [((0.4, 0.6), "GTV"), ((0.6, 0.4), "GSV"), ((0.5, 0.5), "GSV")])
@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_of_two_residues_at_one_position_one_stays(load, occupancies, sequence, apart):
    ser = residue("SER", 2, altloc="A", occupancy=occupancies[0])
    thr = residue("THR", 2, altloc="B", occupancy=occupancies[1], shift=0.5)
    gly, val = residue("GLY", 1), residue("VAL", 3)
    structure = load([*gly, *ser, *val, *thr] if apart else [*gly, *ser, *thr, *val])
    assert structure.sequence == sequence
    assert structure.residue_number.tolist() == [1, 2, 3]
    shift = 0.5 * (sequence == "GTV")
    np.testing.assert_allclose(structure.translation[1], POSITIONS[2, 1] + shift, rtol=0, atol=1e-12)


def test_insertion_codes_stay_in_file_order(load):
    codes = [(1, ""), (2, "B"), (2, "A"), (2, ""), (3, "")]
    atoms = [a for i, (number, code) in enumerate(codes) for a in residue("ALA", number, place=i, icode=code)]
    structure = load(atoms)
    assert list(zip(structure.residue_number.tolist(), structure.insertion_code.tolist(), strict=True)) == codes
    np.testing.assert_array_equal(structure.translation, POSITIONS[: len(codes), 1])


def test_models_count_from_one_in_the_order_of_the_file(load):
    atoms = [a for m in (1, 2, 7) for a in residue("ALA", 1, shift=float(m), model=m)]
    for model, shift in ((1, 1.0), (2, 2.0), (3, 7.0)):
        np.testing.assert_allclose(load(atoms, model=model).translation, [POSITIONS[1, 1] + shift], rtol=0, atol=1e-12)
    assert_same(load(atoms), load(atoms, model=1))
    for model in (0, -1, 4, 7, "1", None):
        with pytest.raises(ValueError, match="from 1 to 3"):
            load(atoms, model=model)


@pytest.mark.parametrize(
    ("name", "letter"),
    [("MSE", "M"), ("SEP", "S"), ("TPO", "T"), ("MLY", "K"), ("DAL", "A"), ("SEC", "X"), ("UNK", "X"), ("QQQ", "X")],
)
def test_modified_residues_stay_and_count_as_their_parent(load, name, letter):
    later = [*residue("MSE", 3, het=True), *residue("VAL", 4)]
    structure = load([*residue("GLY", 1), *residue(name, 2, het=name != "UNK"), *later])
    assert structure.sequence == f"G{letter}MV"
    assert structure.aatype[1] == (RESTYPES + "X").index(letter)
    assert structure.mask.all()


def test_the_twenty_in_alphafolds_order(load):
    names = pytest.importorskip("Bio.Data.PDBData", reason="Biopython is not installed").protein_letters_1to3

    atoms = [a for i, x in enumerate(RESTYPES) for a in residue(names[x].upper(), i + 1, place=i % 12)]
    assert load(atoms).aatype.tolist() == list(range(20))


@pytest.mark.parametrize("missing", ["N", "CA", "C"])
def test_missing_backbone_atom(load, missing):
    atoms = [a for i in (1, 2, 3) for a in residue("LEU", i) if (i, a.name) != (2, missing)]
    structure = load(atoms)
    assert structure.mask.tolist() == [True, False, True]
    assert structure.sequence == "LLL"
    np.testing.assert_array_equal(structure.rotation[1], np.eye(3))
    np.testing.assert_array_equal(structure.translation[1], np.zeros(3))
    np.testing.assert_array_equal(structure.translation[[0, 2]], POSITIONS[[1, 3], 1])


def test_backbone_on_a_line_has_no_frame(load):
    line = [Atom(name, "ALA", 2, (float(i), 0.0, 0.0)) for i, name in enumerate(("N", "CA", "C"))]
    structure = load([*residue("ALA", 1), *line])
    assert structure.mask.tolist() == [True, False]
    np.testing.assert_array_equal(structure.rotation[1], np.eye(3))
    np.testing.assert_array_equal(structure.translation[1], np.zeros(3))


def test_atoms_of_zero_occupancy_are_there(load):
    structure = load([*residue("ALA", 1, occupancy=0.0), *residue("ALA", 2)])
    assert structure.mask.all()


def test_ligands_waters_ions_caps_and_dna_are_left_out(load):
    cap = Atom("CH3", "ACE", 0, (8.0, 8.0, 8.0), het=True)
    protein = [a for i in (1, 2, 3) for a in residue("ALA", i)]
    others = [
        Atom("PG", "ATP", 101, (20.0, 0.0, 0.0), het=True),
        # A ligand may name its atoms as a residue does; calcium's is CA too.
        *residue("LIG", 102, place=9, shift=30.0, het=True),
        Atom("CA", "CA", 103, (25.0, 0.0, 0.0), het=True),
        *residue("GLU", 104, place=9, shift=40.0, het=True),
        Atom("O", "HOH", 201, (30.0, 0.0, 0.0), het=True),
    ]
    dna = [
        [Atom(x, "DA", i, (40.0 + i, y, 0.0), chain="B") for y, x in enumerate(("P", "C3'", "O3'"))] for i in (1, 2, 4)
    ]
    # So may a modified nucleotide.
    dna.insert(2, residue("QQQ", 3, chain="B", het=True))
    structure = load([cap, *protein, *others, *(atom for nucleotide in dna for atom in nucleotide)])
    assert structure.sequence == "AAA"
    assert set(structure.chain_id) == {"A"}
    assert structure.residue_number.tolist() == [1, 2, 3]


def test_chains_follow_in_file_order(load):
    structure = load([*residue("GLY", 5, chain="Z"), *residue("SER", 1, chain="A"), *residue("VAL", 3, chain="M")])
    assert structure.chain_id.tolist() == ["Z", "A", "M"]
    assert structure.sequence == "GSV"
    assert structure.residue_number.tolist() == [5, 1, 3]


# Atoms beyond the backbone


def names(structure: Structure, i: int = 0) -> list[str]:
    return [ATOM_TYPES[slot] for slot in np.flatnonzero(structure.atom37_mask[i])]


def with_atoms(atoms: list[Atom], **positions: tuple[float, float, float]) -> list[Atom]:
    """A residue with more atoms."""
    return atoms + [atoms[0]._replace(name=name, xyz=xyz) for name, xyz in positions.items()]


@pytest.mark.parametrize(
    ("residue_name", "others", "kept"),
    [
        ("ALA", "CB O OXT HA CG", "CB O OXT"),
        ("GLY", "O CB", "O"),
        ("MSE", "CB O CG SE CE", "CB O CG SD CE"),
        ("MET", "CB O CG SE CE", "CB O CG CE"),
        # Methylated lysine's CH2 is not tryptophan's.
        ("MLY", "CB O CG CD CE NZ CH1 CH2", "CB O CG CD CE NZ"),
        ("SEP", "CB O OG P O1P", "CB O OG"),
        ("UNK", "CB O CG CH2 OXT XX1", "CB O CG CH2 OXT"),
        ("SEC", "CB O SE", "CB O"),
    ],
)
def test_atoms_that_the_residue_can_have(load, residue_name, others, kept):
    positions = {name: (10.0 + i, 2.5, -3.125) for i, name in enumerate(others.split())}
    atoms = with_atoms(residue(residue_name, 2), **positions)
    structure = load([*residue("GLY", 1), *atoms, *residue("GLY", 3)])
    assert set(names(structure, 1)) == {"N", "CA", "C", *kept.split()}
    for name, position in positions.items():
        kept_as = "SD" if residue_name == "MSE" and name == "SE" else name
        if kept_as in kept.split():
            assert tuple(structure.atom37[1, ATOM_TYPES.index(kept_as)]) == position
    assert not structure.atom37[~structure.atom37_mask].any()


@pytest.mark.parametrize(("nh1", "nh2"), [(1.0, 2.0), (2.0, 1.0), (1.0, 1.0), (2.0, None), (None, 1.0)])
@pytest.mark.parametrize("cd", [True, False])
def test_nearer_nitrogen_of_arginine_is_nh1(load, nh1, nh2, cd):
    x = {name: (20.0 + x, 0.0, 0.0) for name, x in {"NH1": nh1, "NH2": nh2}.items() if x}
    arginine = with_atoms(residue("ARG", 1), **x, **({"CD": (20.0, 0.0, 0.0)} if cd else {}))
    structure = load([*arginine, *residue("GLY", 2)])
    swapped = cd and (nh1, nh2) == (2.0, 1.0)
    for name, position in x.items():
        renamed = {"NH1": "NH2", "NH2": "NH1"}[name] if swapped else name
        assert tuple(structure.atom37[0, ATOM_TYPES.index(renamed)]) == position
    assert set(names(structure)) == {"N", "CA", "C", *x, *(["CD"] if cd else [])}


@pytest.mark.parametrize(("occupancies", "x"), [((0.3, 0.7), 2.0), ((0.5, 0.5), 1.0)])
def test_side_chain_atom_of_highest_occupancy(load, occupancies, x):
    alanine = residue("ALA", 1)
    alternatives = [
        alanine[0]._replace(name="CB", xyz=(x, 9.0, 9.0), altloc=altloc, occupancy=occupancy)
        for altloc, x, occupancy in zip("AB", (1.0, 2.0), occupancies, strict=True)
    ]
    assert load([*alanine, *alternatives]).atom37[0, ATOM_TYPES.index("CB")].tolist() == [x, 9.0, 9.0]


def test_side_chain_atom_given_twice_is_refused(load):
    alanine = with_atoms(residue("ALA", 1), CB=(1.0, 9.0, 9.0))
    with pytest.raises(ValueError, match="1 ALA"):
        load([*alanine, alanine[-1]._replace(xyz=(2.0, 9.0, 9.0))])


@pytest.mark.parametrize("missing", ["N", "CA", "C"])
def test_atoms_stay_where_there_is_no_frame(load, missing):
    atoms = with_atoms([a for a in residue("ALA", 2) if a.name != missing], CB=(1.0, 9.0, 9.0))
    structure = load([*residue("GLY", 1), *atoms, *residue("GLY", 3)])
    assert structure.mask.tolist() == [True, False, True]
    assert set(names(structure, 1)) == {"N", "CA", "C", "CB"} - {missing}


# PDB alone


@pytest.mark.parametrize("second_ter", [False, True])
def test_two_chains_of_one_name_apart_by_ter(tmp_path, second_ter):
    """As molecular dynamics programs write them, without chain names."""
    atoms = [a for i, name in enumerate(("ALA", "GLY", "SER", "VAL"), 1) for a in residue(name, i, chain=" ")]
    structure = load_structure(written(tmp_path, pdb(atoms, after={5: "TER", **({11: "TER"} if second_ter else {})})))
    assert structure.sequence == "AGSV"
    assert structure.chain_id.tolist() == [""] * 4


def test_free_amino_acid_after_ter_is_a_ligand(tmp_path):
    atoms = [*residue("ALA", 1), *residue("GLY", 2), *residue("MSE", 9, het=True), *residue("GLU", 11, het=True)]
    assert load_structure(written(tmp_path, pdb(atoms, after={5: "TER"}))).sequence == "AG"
    assert load_structure(written(tmp_path, pdb(atoms))).sequence == "AG"


@pytest.mark.parametrize("names", [("ALA", "ALA"), ("ALA", "GLY")])
def test_numbering_that_starts_anew_in_one_chain_is_refused(tmp_path, names):
    atoms = [*residue(names[0], 1), *residue(names[1], 1, place=7)]
    with pytest.raises(ValueError, match=rf"1 {names[1]}.*name of its own"):
        load_structure(written(tmp_path, pdb(atoms, after={2: "TER"})))


@pytest.mark.parametrize("garbage", ["********", "        ", "  1.2.3 "])
def test_coordinates_that_are_no_numbers_are_refused(tmp_path, garbage):
    lines = pdb(residue("ALA", 1)).splitlines(keepends=True)
    lines[1] = lines[1][:38] + garbage + lines[1][46:]
    with pytest.raises(ValueError, match=r"line 2: expected coordinates"):
        load_structure(written(tmp_path, "".join(lines)))


# Names, compression, damage


@pytest.mark.parametrize("name", ["a.pdb", "a.ent", "A.PDB", "a.pdb.gz", "a.ent.gz", "a", "a.txt", "a.gz"])
def test_pdb_by_name_or_contents(tmp_path, name):
    content = pdb([*residue("ALA", 1), *residue("TYR", 2)]).encode()
    structure = load_structure(written(tmp_path, gzip.compress(content) if name.endswith("gz") else content, name))
    assert (structure.sequence, structure.name) == ("AY", name)


@pytest.mark.parametrize("name", ["a.cif", "a.mmcif", "A.CIF", "a.cif.gz", "a", "a.gz"])
def test_mmcif_by_name_or_contents(tmp_path, name):
    content = mmcif([*residue("ALA", 1), *residue("TYR", 2)]).encode()
    path = written(tmp_path, gzip.compress(content) if name.endswith("gz") else content, name)
    assert load_structure(str(path)).sequence == "AY"


WHOLE = [*residue("ALA", 1), *residue("TYR", 2)]
DNA = [Atom(x, "DA", i, (4.0 * i, y, 0.0)) for i in (1, 2) for y, x in enumerate(("P", "C3'", "O3'"))]
WATER = [Atom("O", "HOH", 1, (0.0, 0.0, 0.0), het=True)]
CUT_PDB = pdb(WHOLE)[: 5 * 79 + 50]
CUT_MMCIF = mmcif(WHOLE)[:-40]
BINARY = bytes(range(256)) * 16

DAMAGED = {
    "empty": (b"", "a.pdb", "is empty"),
    "empty cif": (b"", "a.cif", "is empty"),
    "empty gz": (gzip.compress(b""), "a.pdb.gz", "is empty"),
    "blank": (b" \n\n", "a.pdb", "is empty"),
    "cut pdb": (CUT_PDB, "a.pdb", "cut or damaged.*line 6"),
    "cut mmcif": (CUT_MMCIF, "a.cif", "cut or damaged.*loop"),
    "cut gz": (gzip.compress(pdb(WHOLE).encode())[:-30], "a.pdb.gz", "unzipped"),
    "no gz": (b"\x1f\x8bnonsense", "a.pdb.gz", "unzipped"),
    "binary pdb": (BINARY, "a.pdb", "no chain at all"),
    "binary cif": (BINARY, "a.cif", "cannot be read"),
    "binary": (BINARY, "a.bin", "no chain at all"),
    "web page": (b"<html>not found</html>\n", "a.pdb", "no chain at all"),
    "web page cif": (b"<html>not found</html>\n", "a.cif", "cannot be read"),
    "header alone": (b"HEADER    HORMONE\nEND\n", "a.pdb", "no chain at all"),
    "cif without atoms": (b"data_x\n_entry.id x\n", "a.cif", "no chain at all"),
    "mmcif named pdb": (mmcif(WHOLE), "a.pdb", "rename"),
    "pdb named mmcif": (pdb(WHOLE), "a.cif", "rename"),
    "dna": (pdb(DNA), "a.pdb", "expected a protein.*Dna"),
    "dna cif": (mmcif(DNA), "a.cif", "expected a protein.*Dna"),
    "water": (pdb(WATER), "a.pdb", "expected a protein.*no polymer"),
    "bytes in a name": (pdb(WHOLE).encode().replace(b"TYR", b"T\xffR"), "a.pdb", "damaged"),
    "nan": (mmcif(WHOLE).replace(f"{WHOLE[4].xyz[1]:.3f}", "?"), "a.cif", "finite.* CA of residue A 2 TYR"),
}


@pytest.mark.parametrize(("content", "name", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_say_so(tmp_path, content, name, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_structure(written(tmp_path, content, name))
    assert type(caught.value) is ValueError
    assert name in str(caught.value)


@pytest.mark.parametrize("write", [pdb, mmcif])
def test_wherever_a_file_is_cut_it_is_refused_or_read_up_to_there(tmp_path, write):
    content = write(WHOLE)
    outcomes = [
        _load_or_refuse(written(tmp_path, content[:length], f"cut.{write.__name__[-3:]}"))
        for length in range(0, len(content), 7)
    ]
    assert {type(outcome) for outcome in outcomes} == {Structure, ValueError}
    for structure in (outcome for outcome in outcomes if isinstance(outcome, Structure)):
        present = structure.translation[structure.mask]
        np.testing.assert_array_equal(present, POSITIONS[1:3, 1][: len(present)])


def _load_or_refuse(path: Path) -> Structure | ValueError:
    try:
        return load_structure(path)
    except ValueError as error:
        return error


def test_folder_and_missing_file(tmp_path):
    with pytest.raises(ValueError, match="folder"):
        load_structure(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pdb"):
        load_structure(tmp_path / "nowhere.pdb")


def test_without_gemmi_the_message_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gemmi", None)
    with pytest.raises(ImportError, match=r"pip install 'ipa-twins\[structures\]'"):
        load_structure(written(tmp_path, pdb(WHOLE)))


def test_import_loads_no_third_party_module_but_numpy():
    code = (
        "import sys; before = set(sys.modules); import ipa_bridge.proteins, ipa_bridge.proteins.frames; "
        "loaded = {name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names; "
        "assert loaded == {'ipa_bridge', 'numpy'}, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# In a model's unit


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
def test_an_unknown_unit_raises_and_the_message_mends_it(config):
    structure = idealised_peptide()
    with pytest.raises(ValueError, match=r"config\.frame_unit is None.*dataclasses\.replace") as caught:
        structure.rigids(config)
    mend = re.search(r"config = (.*)$", str(caught.value))[1]
    mended = eval(mend, {"dataclasses": dataclasses, "config": config})
    np.testing.assert_array_equal(structure.rigids(mended)[1], structure.translation / 10)


def test_what_takes_no_frames_raises():
    with pytest.raises(ValueError, match="which takes frames was expected; got PredictedLDDTConfig"):
        idealised_peptide().rigids(PredictedLDDTConfig())


IN_ANGSTROMS = r"in units of 10 Å.*median of 3\.8 units apart.*dataclasses\.replace\(config, frame_unit=1\.0\)"


def frames_in_angstroms(residues: int = 42) -> tuple[np.ndarray, np.ndarray]:
    """A peptide's, from the middle of it, and which of them are valid."""
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
    elif what == "noise":  # whose median step is a Cα–Cα distance too
        translation = random_frames(np.random.default_rng(0), (200,), spread=2.9)[1]
        assert 3.6 < np.median(np.linalg.norm(np.diff(translation, axis=0), axis=-1)) < 4.0
        mask = np.ones(200, bool)
    warn_if_in_angstroms(config, translation, mask)


def test_nucleic_acids_in_angstroms_are_not_detected():
    """The documented limit: phosphates or C1' of an A-form strand lie 5 to 7 Å apart."""
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
