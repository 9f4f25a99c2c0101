"""Proteins from PDB and mmCIF files: backbone frames (Suppl. Alg. 21), sequence and mask."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from numpy import ndarray

from ipa_bridge.residues import RESTYPES, UNKNOWN_AATYPE

BACKBONE = ("N", "CA", "C")

SMALLEST_AREA = 1e-3
"""Å²; three backbone atoms that span less lie on a line and define no frame."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Structure:
    """The residues of a protein, chains one after the other as in the file.

    Attributes:
        name: where it came from.
        rotation: backbone frames' rotations, as columns: x_global = rotation · x_local + translation.
        translation: their origins, the Cα positions, in Å.
        mask: True where N, Cα and C define a frame; elsewhere rotation is the identity and translation zero.
        aatype: index into `residues.RESTYPES`, or `UNKNOWN_AATYPE`.
        chain_id: the author's chain names.
        residue_number: the author's numbering.
        insertion_code: "" for none.
    """

    name: str
    rotation: Float64[ndarray, "N 3 3"]
    translation: Float64[ndarray, "N 3"]
    mask: Bool[ndarray, " N"]
    aatype: Int64[ndarray, " N"]
    chain_id: Shaped[ndarray, " N"]
    residue_number: Int64[ndarray, " N"]
    insertion_code: Shaped[ndarray, " N"]

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def sequence(self) -> str:
        """One letter per residue, X where the residue is none of the 20."""
        return "".join((RESTYPES + "X")[aatype] for aatype in self.aatype)


def load_structure(path: str | os.PathLike[str], *, model: int = 1) -> Structure:
    """Reads the protein of a PDB or mmCIF file, gzipped or not.

    Residues are the observed amino acids of protein chains; ligands, waters, nucleic acids and terminal caps (ACE,
    NH2) are left out. Selenomethionine counts as methionine, as in AlphaFold's mmCIF reader; another modified residue
    counts as the amino acid it derives from where gemmi's table has one, else as unknown. Of an atom's alternate
    locations the one of highest occupancy counts, the first of equals; likewise of several residues at one position.
    Atoms of zero occupancy are there. Residues with insertion codes are kept, in the file's order, as AlphaFold's
    mmCIF reader does (its PDB reader refuses them).

    Args:
        path: the file; its format by its name (.pdb, .ent, .cif, .mmcif), else by its contents.
        model: which model, counted from 1 in the file's order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, damaged or no structure; has no protein or no such model.
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


def backbone_frames(
    n: Float[ndarray, "*B 3"], ca: Float[ndarray, "*B 3"], c: Float[ndarray, "*B 3"]
) -> tuple[Float64[ndarray, "*B 3 3"], Float64[ndarray, "*B 3"]]:
    """Rotations and translations from N, Cα and C positions (Suppl. Alg. 21, rigidFrom3Points).

    The origin is Cα, the x-axis points to C, and N lies in the xy-plane with y > 0. Where an atom is missing (NaN) or
    the three lie on a line the rotation is the identity and the translation zero. In float64 whatever comes.
    """
    n, ca, c = (np.asarray(atom, np.float64) for atom in (n, ca, c))
    defined = _defines_frame(n, ca, c)[..., None]
    v1, v2 = np.where(defined, c - ca, [1.0, 0.0, 0.0]), np.where(defined, n - ca, [0.0, 1.0, 0.0])  # lines 1–2
    e1 = v1 / np.linalg.norm(v1, axis=-1, keepdims=True)  # line 3
    u2 = v2 - e1 * np.sum(e1 * v2, -1, keepdims=True)  # line 4
    e2 = u2 / np.linalg.norm(u2, axis=-1, keepdims=True)  # line 5
    return np.stack([e1, e2, np.cross(e1, e2)], -1), np.where(defined, ca, 0.0)  # lines 6–8


def _defines_frame(n: ndarray, ca: ndarray, c: ndarray) -> ndarray:
    # NaN, a missing atom, compares as False.
    return np.linalg.norm(np.cross(n - ca, c - ca), axis=-1) > SMALLEST_AREA


def _read_models(path: Path) -> Any:
    """A gemmi.Structure with at least one model, its entities told apart."""
    try:
        import gemmi
    except ImportError as error:
        raise ImportError("reading structures needs gemmi: pip install 'ipa-twins[structures]'") from error
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
    # gemmi raises whatever its parsers meet.
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
    """Refuses a PDB file with coordinates that are no numbers: gemmi would read them as zero."""
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
    positions = np.array([[_position(path, chain, residue, name) for name in BACKBONE] for chain, residue in residues])
    n, ca, c = np.moveaxis(positions, 1, 0)
    rotation, translation = backbone_frames(n, ca, c)
    return Structure(
        name=path.name,
        rotation=rotation,
        translation=translation,
        mask=_defines_frame(n, ca, c),
        aatype=np.array([_aatype(residue.name) for _, residue in residues], np.int64),
        chain_id=np.array([chain for chain, _ in residues]),
        residue_number=np.array([residue.seqid.num for _, residue in residues], np.int64),
        insertion_code=np.array([residue.seqid.icode.strip() for _, residue in residues]),
    )


def _protein_residues(path: Path, model: Any) -> Iterator[tuple[str, Any]]:
    """(chain name, residue) along the protein chains; one residue per position."""
    for chain in model:
        positions: dict[tuple[int, str], list[Any]] = {}
        for residue in _amino_acids(chain):
            positions.setdefault((residue.seqid.num, residue.seqid.icode), []).append(residue)
        for alternatives in positions.values():
            if sum(residue[0].altloc == "\0" for residue in alternatives) > 1:
                _refuse_twins(path, chain.name, alternatives[-1])
            yield chain.name, max(alternatives, key=lambda residue: max(atom.occ for atom in residue))


def _amino_acids(chain: Any) -> Iterator[Any]:
    """The amino acids of a chain that are part of its protein, in the file's order.

    Which residues form a polymer is gemmi's judgement: entities in mmCIF; in PDB what stands before TER, else what
    hangs together. Without TER it ends the polymer at a selenocysteine recorded as HETATM, and it takes all that
    follows a TER for ligands, also a second chain of the same or no name. Free amino acids are recorded as HETATM
    behind the chain: one with an ATOM amino acid after it is part of the protein.
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


def _position(path: Path, chain: str, residue: Any, name: str) -> list[float]:
    """An atom's coordinates in Å, NaN if it is not there."""
    locations = [atom for atom in residue if atom.name == name]
    if not locations:
        return [np.nan] * 3
    if len({atom.altloc for atom in locations}) < len(locations):
        _refuse_twins(path, chain, residue)
    position = max(locations, key=lambda atom: atom.occ).pos.tolist()
    if not np.isfinite(position).all():
        raise ValueError(
            f"{path}: expected finite coordinates; atom {name} of residue {chain} {residue.seqid} {residue.name} "
            f"is at {position}: correct it or take the atom out"
        )
    return position


def _refuse_twins(path: Path, chain: str, residue: Any) -> None:
    raise ValueError(
        f"{path}: expected one residue at a position, or alternate location labels; chain {chain!r} has another at "
        f"{residue.seqid} {residue.name}: give every chain a name of its own"
    )


def _kind(chain: Any) -> str:
    polymer = chain.get_polymer()
    return polymer.check_polymer_type().name if len(polymer) else "no polymer"


def _aatype(name: str) -> int:
    import gemmi

    aatype = RESTYPES.find(gemmi.find_tabulated_residue(name).one_letter_code.upper())
    return UNKNOWN_AATYPE if aatype < 0 else aatype
