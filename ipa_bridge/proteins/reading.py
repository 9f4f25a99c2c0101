"""Reading of proteins from PDB and mmCIF files: heavy atoms, backbone frames, sequence and mask."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ipa_bridge.proteins.frames import backbone_frames, defines_frame
from ipa_bridge.proteins.residues import ATOM_ORDER, ATOM_TYPES, RESTYPES, UNKNOWN_AATYPE, may_have
from ipa_bridge.proteins.structure import Structure, import_gemmi

if TYPE_CHECKING:
    from numpy import ndarray

BACKBONE = ("N", "CA", "C")


def load_structure(path: str | os.PathLike[str], *, model: int = 1) -> Structure:
    """Reads the protein of a PDB or mmCIF file, gzipped or not.

    Residues are the observed amino acids of protein chains; ligands, waters, nucleic acids and terminal caps (ACE,
    NH2) are left out. Selenomethionine counts as methionine, as in AlphaFold's mmCIF reader. Another modified residue
    counts as the amino acid that gemmi's table derives it from, or as unknown if the table has none. Among alternate
    locations of an atom, the one with the highest occupancy is kept, the first if several are equal; the same holds for
    several residues at one position. Atoms of zero occupancy are kept. Residues with insertion codes are kept, in the
    file's order, as in AlphaFold's mmCIF reader (its PDB reader refuses them).

    A residue keeps the atoms of its type, and OXT; an unknown residue keeps all atoms named in `ATOM_TYPES`.
    AlphaFold's readers keep all of the latter for every residue; only modified residues then differ. As in AlphaFold's
    mmCIF reader, the selenium of selenomethionine is named SD, and of an arginine's two outer nitrogens the one nearer
    to CD is named NH1, the other NH2.

    Args:
        path: the file; its suffix (.pdb, .ent, .cif, .mmcif) sets the format; if it is another one, the contents do.
        model: number of the model, counted from 1 in the file's order.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is empty, damaged or not a structure, or it has no protein or no such model.
        ImportError: gemmi, which reads the files, is not installed.
    """
    path = Path(path)
    models = _read_models(path)
    if model not in range(1, len(models) + 1):
        raise ValueError(f"{path}: model must be from 1 to {len(models)}, which the file has; got {model!r}")
    try:
        return _structure(path, models[int(model) - 1])
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected ASCII names of chains and residues; the file is damaged") from error


def _read_models(path: Path) -> Any:
    """Reads a gemmi.Structure with at least one chain and sets up its entities."""
    gemmi = import_gemmi("reading")
    content = _contents(path)
    stem = path.name.lower().removesuffix(".gz")
    coordinates = gemmi.CoorFormat.Detect
    if stem.endswith((".pdb", ".ent")):
        coordinates = gemmi.CoorFormat.Pdb
    elif stem.endswith((".cif", ".mmcif")):
        coordinates = gemmi.CoorFormat.Mmcif
    try:
        models = gemmi.read_structure_string(content, format=coordinates)
        models.setup_entities()
    # gemmi's parsers raise exceptions of many types.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(": ")
        raise ValueError(
            f"{path}: cannot be read as PDB or mmCIF, it may be cut or damaged: {reason}; fetch it again, or rename it "
            "if it is in the other format"
        ) from error
    if not any(len(model) for model in models):
        raise ValueError(f"{path}: expected a protein; the file has no chain at all: is it PDB or mmCIF?")
    if models.input_format == gemmi.CoorFormat.Pdb:
        _check_coordinates(path, content)
    return models


def _contents(path: Path) -> bytes:
    if path.is_dir():
        raise ValueError(f"{path} is a folder: expected a PDB or mmCIF file")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{path}: cannot be unzipped, it may be cut or damaged: {error}; fetch it again"
            ) from error
    if not content.strip():
        raise ValueError(f"{path} is empty: expected a PDB or mmCIF file")
    return content


def _check_coordinates(path: Path, content: bytes) -> None:
    """Raises if coordinates in a PDB file are not numbers: gemmi would read them as zero."""
    for number, line in enumerate(content.splitlines(), 1):
        if line[:6].upper() in (b"ATOM  ", b"HETATM"):
            try:
                _ = float(line[30:38]), float(line[38:46]), float(line[46:54])
            except ValueError:
                raise ValueError(
                    f"{path}, line {number}: expected coordinates in columns 31–54; got {line[30:54]!r}"
                ) from None


def _structure(path: Path, model: Any) -> Structure:
    residues = list(_protein_residues(path, model))
    if not residues:
        found = ", ".join(f"{chain.name} ({_kind(chain)})" for chain in model) or "no chain at all"
        raise ValueError(f"{path}: expected a protein; the file has {found}")
    aatype = np.array([_aatype(residue.name) for _, residue in residues], np.int64)
    atom37 = np.array([_atoms(path, *residue, t) for residue, t in zip(residues, aatype, strict=True)])
    _name_arginine_nitrogens(atom37, aatype)
    n, ca, c = (atom37[:, ATOM_ORDER[name]] for name in BACKBONE)
    rotation, translation = backbone_frames(n, ca, c)
    return Structure(
        name=path.name,
        rotation=rotation,
        translation=translation,
        mask=defines_frame(n, ca, c),
        atom37=np.nan_to_num(atom37, nan=0.0),
        atom37_mask=~np.isnan(atom37[..., 0]),
        aatype=aatype,
        chain_id=np.array([chain for chain, _ in residues]),
        residue_number=np.array([residue.seqid.num for _, residue in residues], np.int64),
        insertion_code=np.array([residue.seqid.icode.strip() for _, residue in residues]),
    )


def _protein_residues(path: Path, model: Any) -> Iterator[tuple[str, Any]]:
    """Yields (chain name, residue) along the protein chains, one residue per position."""
    for chain in model:
        positions: dict[tuple[int, str], list[Any]] = {}
        for residue in _amino_acids(chain):
            positions.setdefault((residue.seqid.num, residue.seqid.icode), []).append(residue)
        for alternatives in positions.values():
            if sum(residue[0].altloc == "\0" for residue in alternatives) > 1:
                _refuse_twins(path, chain.name, alternatives[-1])
            yield chain.name, max(alternatives, key=lambda residue: max(atom.occ for atom in residue))


def _amino_acids(chain: Any) -> Iterator[Any]:
    """Yields the amino acids of a chain that are part of its protein, in the file's order.

    gemmi decides which residues form a polymer: by entities in mmCIF; in PDB by TER or, without TER, by connectivity.
    This fails in two cases. Without TER, gemmi ends the polymer at a selenocysteine recorded as HETATM. After a TER, it
    takes everything for ligands, even a second chain with the same name or none. Therefore an amino acid is also part
    of the protein if it or a later one is recorded as ATOM; free amino acids are HETATM after the chain.
    """
    import gemmi

    peptide = (gemmi.PolymerType.PeptideL, gemmi.PolymerType.PeptideD)
    proteins = {span.subchain_id() for span in chain.subchains() if span.check_polymer_type() in peptide}
    tabulated = [gemmi.find_tabulated_residue(residue.name).is_amino_acid() for residue in chain]
    end = max((i for i, residue in enumerate(chain) if tabulated[i] and residue.het_flag == "A"), default=-1)
    for i, residue in enumerate(chain):
        in_polymer = residue.entity_type == gemmi.EntityType.Polymer and residue.subchain in proteins
        if (tabulated[i] and (in_polymer or i <= end)) or (in_polymer and residue.get_ca()):
            yield residue


def _atoms(path: Path, chain: str, residue: Any, aatype: int) -> ndarray:
    """A residue's atom37 positions in Å; NaN for missing atoms."""
    locations: dict[int, list[Any]] = {}
    for atom in residue:
        slot = ATOM_ORDER.get("SD" if (residue.name, atom.name) == ("MSE", "SE") else atom.name)
        if slot is not None and may_have(aatype)[slot]:
            locations.setdefault(slot, []).append(atom)
    positions = np.full((len(ATOM_TYPES), 3), np.nan)
    for slot, atoms in locations.items():
        if len({atom.altloc for atom in atoms}) < len(atoms):
            _refuse_twins(path, chain, residue)
        positions[slot] = max(atoms, key=lambda atom: atom.occ).pos.tolist()
        if not np.isfinite(positions[slot]).all():
            raise ValueError(
                f"{path}: expected finite coordinates; atom {atoms[0].name} of residue {chain} {residue.seqid} "
                f"{residue.name} is at {positions[slot].tolist()}: correct it or take the atom out"
            )
    return positions


def _name_arginine_nitrogens(atom37: ndarray, aatype: ndarray) -> None:
    """Exchanges NH1 and NH2, in place, where NH2 is nearer to CD; a missing atom (NaN) compares as False."""
    nh1, nh2 = ATOM_ORDER["NH1"], ATOM_ORDER["NH2"]
    distance = np.linalg.norm(atom37[:, [nh1, nh2]] - atom37[:, None, ATOM_ORDER["CD"]], axis=-1)
    swapped = (aatype == RESTYPES.index("R")) & (distance[:, 0] > distance[:, 1])
    atom37[np.ix_(swapped, [nh1, nh2])] = atom37[np.ix_(swapped, [nh2, nh1])]


def _refuse_twins(path: Path, chain: str, residue: Any) -> None:
    raise ValueError(
        f"{path}: expected one residue per position, or alternate location labels; chain {chain!r} has a second one at "
        f"{residue.seqid} {residue.name}: give every chain a name of its own"
    )


def _kind(chain: Any) -> str:
    polymer = chain.get_polymer()
    return polymer.check_polymer_type().name if len(polymer) else "no polymer"


def _aatype(name: str) -> int:
    import gemmi

    aatype = RESTYPES.find(gemmi.find_tabulated_residue(name).one_letter_code.upper())
    return UNKNOWN_AATYPE if aatype < 0 else aatype
