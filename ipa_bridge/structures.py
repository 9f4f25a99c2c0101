"""Proteins from PDB and mmCIF files: backbone frames, sequence and mask."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ipa_bridge.residues import RESTYPES, UNKNOWN_AATYPE

BACKBONE = ("N", "CA", "C")

SMALLEST_AREA = 1e-3
"""Å²; three backbone atoms that span less lie on a line and define no frame."""


@dataclass(frozen=True, kw_only=True)
class Structure:
    """The residues of a protein, chains one after the other as in the file.

    Attributes:
        name: where it came from.
        rotation: (N, 3, 3), the backbone frames: x_global = rotation · x_local + translation.
        translation: (N, 3), Cα positions in Å.
        mask: (N,), True where N, Cα and C are there; elsewhere the frame is the identity.
        aatype: (N,), index into `residues.RESTYPES`, or `UNKNOWN_AATYPE`.
        chain_id: (N,), the author's chain names.
        residue_number: (N,), the author's numbering.
        insertion_code: (N,), "" for none.
    """

    name: str
    rotation: np.ndarray
    translation: np.ndarray
    mask: np.ndarray
    aatype: np.ndarray
    chain_id: np.ndarray
    residue_number: np.ndarray
    insertion_code: np.ndarray

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def sequence(self) -> str:
        """One letter per residue, X where the residue is none of the 20."""
        return "".join((RESTYPES + "X")[aatype] for aatype in self.aatype)


def load_structure(path: str | os.PathLike[str], *, model: int = 1) -> Structure:
    """Reads the protein of a PDB or mmCIF file, gzipped or not.

    Residues are those observed in protein chains; ligands, waters and nucleic acids are left out. As AlphaFold's
    readers do, an atom with alternate locations takes the one of highest occupancy, the first of equals, and
    selenomethionine counts as methionine; other modified residues count as the amino acid they derive from, else
    as unknown. Of two residues at one position the one of higher occupancy stays. Residues with insertion codes
    are kept, as AlphaFold's mmCIF reader does (its PDB reader refuses them).

    Args:
        path: the file; its format by its name (.pdb, .ent, .cif, .mmcif), else by its contents.
        model: which model, counted from 1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, damaged or no structure; has no protein or no such model.
        ImportError: gemmi, which reads the files, is not installed.
    """
    path = Path(path)
    molecule = _read(path)
    if not 1 <= model <= len(molecule):
        raise ValueError(f"{path}: model must be from 1 to {len(molecule)}, which the file has; got {model}")
    residues = list(_protein_residues(molecule[model - 1]))
    if not residues:
        found = ", ".join(f"{c.name} ({_kind(c)})" for c in molecule[model - 1]) or "no chain at all"
        raise ValueError(f"{path}: expected a protein; the file has {found}")
    positions = np.array([[_position(path, chain, residue, name) for name in BACKBONE] for chain, residue in residues])
    rotation, translation = backbone_frames(*np.moveaxis(positions, 1, 0))
    ids = [residue.seqid for _, residue in residues]
    return Structure(
        name=path.name,
        rotation=rotation,
        translation=translation,
        mask=_defines_frame(*np.moveaxis(positions, 1, 0)),
        aatype=np.array([_aatype(residue.name) for _, residue in residues]),
        chain_id=np.array([chain for chain, _ in residues]),
        residue_number=np.array([seqid.num for seqid in ids]),
        insertion_code=np.array([seqid.icode.strip() for seqid in ids]),
    )


def backbone_frames(n: np.ndarray, ca: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotations (*B, 3, 3) and translations (*B, 3) from N, Cα and C positions (Suppl. Alg. 21).

    The origin is Cα, the x-axis points to C, and N lies in the xy-plane with y > 0. Where an atom is missing (NaN) or
    the three lie on a line the frame is the identity.
    """
    defined = _defines_frame(n, ca, c)[..., None]
    to_n, to_c = np.where(defined, n - ca, [0.0, 1.0, 0.0]), np.where(defined, c - ca, [1.0, 0.0, 0.0])
    e1 = to_c / np.linalg.norm(to_c, axis=-1, keepdims=True)
    u2 = to_n - e1 * np.sum(e1 * to_n, -1, keepdims=True)
    e2 = u2 / np.linalg.norm(u2, axis=-1, keepdims=True)
    return np.stack([e1, e2, np.cross(e1, e2)], -1), np.where(defined, ca, 0.0)


def _defines_frame(n: np.ndarray, ca: np.ndarray, c: np.ndarray) -> np.ndarray:
    # NaN, a missing atom, compares as False.
    return np.linalg.norm(np.cross(n - ca, c - ca), axis=-1) > SMALLEST_AREA


def _read(path: Path) -> Any:
    """A gemmi.Structure with its entities told apart, or a plain error."""
    try:
        import gemmi
    except ImportError as error:
        raise ImportError("reading structures needs gemmi: pip install 'ipa-twins[structures]'") from error
    if path.is_dir():
        raise ValueError(f"{path} is a folder: expected a PDB or mmCIF file")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: expected a PDB or mmCIF file")
    stem = path.name.removesuffix(".gz").lower()
    named = stem.endswith((".pdb", ".ent", ".cif", ".mmcif"))
    try:
        molecule = gemmi.read_structure(
            str(path), format=gemmi.CoorFormat.Unknown if named else gemmi.CoorFormat.Detect
        )
        molecule.setup_entities()
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: cannot be read as PDB or mmCIF, it may be cut or damaged: {reason}") from error
    return molecule


def _protein_residues(model: Any) -> Iterator[tuple[str, Any]]:
    """(chain name, residue) along the protein chains; one residue per position."""
    for chain in model:
        polymer = chain.get_polymer()
        if _kind(chain) != "protein":
            continue
        for _, alternatives in itertools.groupby(polymer, key=lambda residue: (residue.seqid.num, residue.seqid.icode)):
            yield chain.name, max(alternatives, key=lambda residue: max(atom.occ for atom in residue))


def _kind(chain: Any) -> str:
    import gemmi

    polymer = chain.get_polymer()
    if not len(polymer):
        return "no polymer"
    kind = polymer.check_polymer_type()
    if kind in (gemmi.PolymerType.PeptideL, gemmi.PolymerType.PeptideD):
        return "protein"
    return kind.name


def _position(path: Path, chain: str, residue: Any, name: str) -> list[float]:
    """An atom's coordinates in Å, NaN if it is not there."""
    locations = [atom for atom in residue if atom.name == name]
    if not locations:
        return [np.nan] * 3
    position = max(locations, key=lambda atom: atom.occ).pos.tolist()
    if not np.isfinite(position).all():
        raise ValueError(f"{path}: atom {name} of residue {chain} {residue.seqid} {residue.name} is at {position}")
    return position


def _aatype(name: str) -> int:
    import gemmi

    letter = gemmi.find_tabulated_residue(name).one_letter_code.upper()
    return RESTYPES.index(letter) if letter.strip() and letter in RESTYPES else UNKNOWN_AATYPE
