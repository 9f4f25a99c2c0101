"""Proteins from and to PDB and mmCIF files: heavy atoms, backbone frames (Suppl. Alg. 21), sequence and mask."""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ipa_bridge.config import IPABlockConfig, IPAConfig, IPATransformerConfig, StructureModuleConfig
from ipa_bridge.files import _replacing
from ipa_bridge.residues import ATOM37_MASK, ATOM_TYPES, RESTYPE_NAMES, RESTYPES, UNKNOWN_AATYPE

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float64, Int, Int64, Shaped
    from numpy import ndarray
    from numpy.typing import ArrayLike

BACKBONE = ("N", "CA", "C")

ATOM_ORDER = {name: slot for slot, name in enumerate(ATOM_TYPES)}
"""atom37 slot by atom name."""

MMCIF_GROUPS = (
    *("atoms", "group_pdb", "auth_all", "atom_type", "block_name", "entry", "entity", "entity_poly"),
    *("entity_poly_seq", "struct_asym", "title_keywords"),
)
"""The mmCIF categories written, by gemmi's names."""

WRITTEN = (".pdb", ".cif", ".pdb.gz", ".cif.gz")

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
        atom37: heavy atoms in Å, in the order of `residues.ATOM_TYPES`; zero where there is none.
        atom37_mask: True where the atom is there.
        aatype: index into `residues.RESTYPES`, or `UNKNOWN_AATYPE`.
        chain_id: the author's chain names.
        residue_number: the author's numbering.
        insertion_code: "" for none.
    """

    name: str
    rotation: Float64[ndarray, "N 3 3"]
    translation: Float64[ndarray, "N 3"]
    mask: Bool[ndarray, " N"]
    atom37: Float64[ndarray, "N 37 3"]
    atom37_mask: Bool[ndarray, "N 37"]
    aatype: Int64[ndarray, " N"]
    chain_id: Shaped[ndarray, " N"]
    residue_number: Int64[ndarray, " N"]
    insertion_code: Shaped[ndarray, " N"]

    def __len__(self) -> int:
        return len(self.mask)

    def __repr__(self) -> str:
        chains = len(set(self.chain_id.tolist()))
        resolved = int(self.mask.sum())
        return (
            f"Structure({self.name!r}: {len(self)} residues in {chains} chain{'s' * (chains != 1)}, {resolved} with a "
            "backbone frame)"
        )

    @property
    def sequence(self) -> str:
        """One letter per residue, X where the residue is none of the 20."""
        return "".join((RESTYPES + "X")[aatype] for aatype in self.aatype)

    def rigids(
        self, config: IPAConfig | IPABlockConfig | IPATransformerConfig | StructureModuleConfig
    ) -> tuple[Float64[ndarray, "N 3 3"], Float64[ndarray, "N 3"]]:
        """Rotations and translations in the unit in which the config's module takes frames, its frame_unit.

        For `ipa_jax.Rigid(*…)`, or `ipa_torch.Rigid(*map(torch.as_tensor, …))`; the mask goes with them.

        Raises:
            ValueError: the unit is unknown, or the config's module takes no frames.
        """
        if not hasattr(config, "frame_unit"):
            raise ValueError(f"the config of a module which takes frames was expected; got {type(config).__name__}")
        if config.frame_unit is None:
            raise ValueError(
                "config.frame_unit is None: how many Å are a unit of this model's frames is unknown. Tell it, 10.0 for "
                f"frames in 10 Å or 1.0 for Å: config = {_with_unit(config)}"
            )
        return self.rotation, self.translation / config.frame_unit


def _with_unit(config: IPAConfig | IPABlockConfig | IPATransformerConfig | StructureModuleConfig) -> str:
    """Python that tells the config's unit."""
    path = {IPABlockConfig: ("ipa",), IPATransformerConfig: ("block", "ipa")}.get(type(config), ())
    value = "frame_unit=10.0"
    for depth in reversed(range(len(path) + 1)):
        inner = ".".join(("config", *path[:depth]))
        value = f"dataclasses.replace({inner}, {value})"
        value = f"{path[depth - 1]}={value}" if depth else value
    return value


def load_structure(path: str | os.PathLike[str], *, model: int = 1) -> Structure:
    """Reads the protein of a PDB or mmCIF file, gzipped or not.

    Residues are the observed amino acids of protein chains; ligands, waters, nucleic acids and terminal caps (ACE,
    NH2) are left out. Selenomethionine counts as methionine, as in AlphaFold's mmCIF reader; another modified residue
    counts as the amino acid it derives from where gemmi's table has one, else as unknown. Of an atom's alternate
    locations the one of highest occupancy counts, the first of equals; likewise of several residues at one position.
    Atoms of zero occupancy are there. Residues with insertion codes are kept, in the file's order, as AlphaFold's
    mmCIF reader does (its PDB reader refuses them).

    The atoms are those that the residue's type has, and OXT; AlphaFold's readers take every name of `ATOM_TYPES`, which
    differs in modified residues alone. An unknown residue keeps every such name, as there. As in AlphaFold's mmCIF
    reader, the selenium of selenomethionine is SD, and of an arginine's NH1 and NH2 the one nearer to CD is NH1.

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


def save_structure(
    path: str | os.PathLike[str],
    atom37: Float[ArrayLike, "N 37 3"],
    aatype: Int[ArrayLike, " N"],
    *,
    atom37_mask: Shaped[ArrayLike, "N 37"] | None = None,
    chain_id: Shaped[ArrayLike, " N"] | None = None,
    residue_number: Int[ArrayLike, " N"] | None = None,
    insertion_code: Shaped[ArrayLike, " N"] | None = None,
    b_factor: Float[ArrayLike, " N"] | Float[ArrayLike, "N 37"] | None = None,
    name: str | None = None,
) -> None:
    """Writes a protein as PDB or mmCIF: beside the destination first, which is then replaced in one step.

    Arrays may be numpy's, JAX's or detached CPU tensors. Every residue is part of its chain's sequence (SEQRES,
    entity_poly_seq), also one without atoms; a chain without any is left out. Unknown residues are UNK.

    Args:
        path: the destination, .pdb, .cif or either with .gz; an existing file is left as it was if anything fails.
        atom37: positions in Å, in the order of `residues.ATOM_TYPES`; whatever where the mask is 0.
        aatype: index into `residues.RESTYPES`, or `UNKNOWN_AATYPE`.
        atom37_mask: 1 or True where the atom is there; None for all heavy atoms of the residue's type (none of an
            unknown one).
        chain_id: chain names, each chain's residues together; None for one chain A. At most 62 of one letter in PDB.
        residue_number: None to count from 1 in every chain.
        insertion_code: a letter or digit, or "" for none.
        b_factor: per residue, or per atom (N, 37), such as pLDDT; None for 0.
        name: the title, one line of ASCII; PDB has it in capitals.

    Raises:
        ValueError: another suffix, arrays that do not fit each other or their meaning, or what PDB cannot hold.
        ImportError: gemmi, which writes the files, is not installed.
    """
    path = Path(path)
    suffix = next((suffix for suffix in WRITTEN if path.name.lower().endswith(suffix)), None)
    if suffix is None:
        raise ValueError(f"{path}: expected a name ending in {', '.join(WRITTEN)}")
    if name is not None and not (name.isascii() and name.isprintable()):
        raise ValueError(f"name must be one line of ASCII; got {name!r}")
    positions = np.asarray(_without_bfloat16(atom37))
    n = len(positions) if positions.ndim else 0
    positions = _numbers("atom37", positions, (n, len(ATOM_TYPES), 3), np.float64)
    types = _numbers("aatype", aatype, (n,), np.int64)
    if not ((types >= 0) & (types <= UNKNOWN_AATYPE)).all():
        raise ValueError(f"aatype must be from 0 to {UNKNOWN_AATYPE}; got {types.min()} to {types.max()}")
    chains = _texts("chain_id", ["A"] * n if chain_id is None else chain_id, n)
    by_atom = np.zeros((n, len(ATOM_TYPES))) if b_factor is None else np.asarray(_without_bfloat16(b_factor))
    if by_atom.shape == (n,):
        by_atom = np.tile(by_atom[:, None], len(ATOM_TYPES))
    residues = _Residues(
        atom37=positions,
        mask=ATOM37_MASK[types] if atom37_mask is None else _truths("atom37_mask", atom37_mask, positions.shape[:2]),
        aatype=types,
        chain_id=chains,
        number=_count(chains) if residue_number is None else _numbers("residue_number", residue_number, (n,), np.int64),
        insertion_code=_texts("insertion_code", [""] * n if insertion_code is None else insertion_code, n),
        b_factor=_numbers("b_factor", by_atom, positions.shape[:2], np.float64),
    )
    _check_residues(residues)
    _check_atoms(residues)
    if suffix.startswith(".pdb"):
        _check_pdb_limits(path, residues)
    else:
        _check_mmcif_names(path, residues)
    content = _text(residues, suffix, name, path.name[: -len(suffix)]).encode()
    with _replacing(path) as handle:
        handle.write(gzip.compress(content, mtime=0) if suffix.endswith(".gz") else content)


def _without_bfloat16(array: Any) -> Any:
    """Tensors of torch's bfloat16 in float32, for numpy has none of its own."""
    return array.float() if str(getattr(array, "dtype", "")) == "torch.bfloat16" else array


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
    gemmi = _gemmi("reading")
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


def _gemmi(verb: str) -> Any:
    try:
        import gemmi
    except ImportError as error:
        raise ImportError(f"{verb} structures needs gemmi: pip install 'ipa-twins[structures]'") from error
    return gemmi


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
    aatype = np.array([_aatype(residue.name) for _, residue in residues], np.int64)
    atom37 = np.array([_atoms(path, *residue, t) for residue, t in zip(residues, aatype, strict=True)])
    _name_arginine_nitrogens(atom37, aatype)
    n, ca, c = (atom37[:, ATOM_ORDER[name]] for name in BACKBONE)
    rotation, translation = backbone_frames(n, ca, c)
    return Structure(
        name=path.name,
        rotation=rotation,
        translation=translation,
        mask=_defines_frame(n, ca, c),
        atom37=np.nan_to_num(atom37, nan=0.0),
        atom37_mask=~np.isnan(atom37[..., 0]),
        aatype=aatype,
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


def _atoms(path: Path, chain: str, residue: Any, aatype: int) -> ndarray:
    """A residue's atom37 positions in Å, NaN where an atom is not there."""
    locations: dict[int, list[Any]] = {}
    for atom in residue:
        slot = ATOM_ORDER.get("SD" if (residue.name, atom.name) == ("MSE", "SE") else atom.name)
        if slot is not None and _may_have(aatype)[slot]:
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


def _may_have(aatype: int) -> ndarray:
    """The atoms of atom37 that a residue can have: its type's and OXT, or any if it is unknown."""
    return ATOM37_MASK[aatype] | (aatype == UNKNOWN_AATYPE) | (np.arange(len(ATOM_TYPES)) == ATOM_ORDER["OXT"])


def _name_arginine_nitrogens(atom37: ndarray, aatype: ndarray) -> None:
    """Exchanges, in place, NH1 and NH2 where NH2 is the one nearer to CD; a missing atom, NaN, compares as False."""
    nh1, nh2 = ATOM_ORDER["NH1"], ATOM_ORDER["NH2"]
    distance = np.linalg.norm(atom37[:, [nh1, nh2]] - atom37[:, None, ATOM_ORDER["CD"]], axis=-1)
    swapped = (aatype == RESTYPES.index("R")) & (distance[:, 0] > distance[:, 1])
    atom37[np.ix_(swapped, [nh1, nh2])] = atom37[np.ix_(swapped, [nh2, nh1])]


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


@dataclass(frozen=True, kw_only=True, eq=False)
class _Residues:
    """What is to be written; b_factor by atom."""

    atom37: ndarray
    mask: ndarray
    aatype: ndarray
    chain_id: ndarray
    number: ndarray
    insertion_code: ndarray
    b_factor: ndarray

    def label(self, i: int) -> str:
        return f"{self.chain_id[i]} {self.number[i]}{self.insertion_code[i]} {RESTYPE_NAMES[self.aatype[i]]}"


def _numbers(name: str, x: ArrayLike, shape: tuple[int, ...], dtype: type) -> ndarray:
    array = np.asarray(x)
    if array.shape != shape:
        raise ValueError(f"{name} must be {shape}; got {array.shape}")
    if array.dtype == bool or not np.can_cast(array.dtype, dtype, "same_kind"):
        kind = "whole numbers" if dtype is np.int64 else "real numbers"
        raise ValueError(f"{name} must be {kind}; got {array.dtype}: cast it if that is what it means")
    return array.astype(dtype)


def _truths(name: str, x: ArrayLike, shape: tuple[int, ...]) -> ndarray:
    array = np.asarray(x)
    if array.shape != shape:
        raise ValueError(f"{name} must be {shape}; got {array.shape}")
    if not np.isin(array, (0, 1)).all():
        raise ValueError(f"{name} must be 0 and 1, or bool; it has other values: compare it with a threshold first")
    return array.astype(bool)


def _texts(name: str, x: ArrayLike, n: int) -> ndarray:
    array = np.asarray(x)
    if array.shape != (n,):
        raise ValueError(f"{name} must be ({n},), one for every residue; got {array.shape}")
    for text in array.tolist():
        if not isinstance(text, str) or not text.isascii() or not text.isprintable() or " " in text:
            raise ValueError(f"{name} must be strings of ASCII without spaces; got {text!r}")
    return array.astype(str)


def _count(chain_id: ndarray) -> ndarray:
    """Numbers from 1 in every chain."""
    _, start, chain = np.unique(chain_id, return_index=True, return_inverse=True)
    return np.arange(len(chain_id)) - start[chain] + 1


def _check_residues(residues: _Residues) -> None:
    seen: dict[tuple[str, int, str], int] = {}
    for i, (chain, number, code) in enumerate(
        zip(residues.chain_id.tolist(), residues.number.tolist(), residues.insertion_code.tolist(), strict=True)
    ):
        if i and chain != residues.chain_id[i - 1] and chain in residues.chain_id[:i]:
            raise ValueError(f"chain_id: expected each chain's residues together; chain {chain!r} comes back at {i}")
        if len(code) > 1 or not (code.isalnum() or not code):
            raise ValueError(f'insertion_code must be a letter, a digit or ""; got {code!r} at residue {i}')
        if not -(2**31) <= number < 2**31:
            raise ValueError(f"residue_number must fit 32 bits; got {number} at residue {i}")
        first = seen.setdefault((chain, number, code), i)
        if first != i:
            raise ValueError(
                f"expected one residue at a position; {residues.label(first)} and {residues.label(i)} share chain, "
                "number and insertion code: give every chain a name of its own, or renumber"
            )


def _check_atoms(residues: _Residues) -> None:
    if not residues.mask.any():
        raise ValueError("expected at least one atom; atom37_mask (of unknown residues, unless given) has none")
    for what, wrong in {
        "of a finite position": ~np.isfinite(residues.atom37).all(-1),
        "with a finite b_factor": ~np.isfinite(residues.b_factor),
        "that its residue can have (residues.ATOM37_MASK, OXT)": ~np.array([_may_have(t) for t in residues.aatype]),
    }.items():
        for i, slot in np.argwhere(residues.mask & wrong):
            raise ValueError(
                f"expected every atom {what}; {ATOM_TYPES[slot]} of residue {residues.label(i)} at index {i} is at "
                f"{residues.atom37[i, slot].tolist()}, b_factor {residues.b_factor[i, slot]}: correct it, or take it "
                "out of atom37_mask"
            )


def _check_pdb_limits(path: Path, residues: _Residues) -> None:
    """Columns of a PDB file are narrow; every chain ends with a TER, which takes a serial number too."""
    chains = set(residues.chain_id.tolist())
    serials = int(residues.mask.sum()) + len(chains)
    positions, b_factors = residues.atom37[residues.mask].round(3), residues.b_factor[residues.mask].round(2)
    for fits, limit, got in (
        (len(chains) <= 62, "at most 62 chains", len(chains)),
        (max(map(len, chains)) <= 1, "chain names of one character", sorted(chains)),
        (serials <= 99_999, "at most 99,999 atoms and ends of chains", serials),
        _between(residues.number, "residue numbers", -999, 9999),
        _between(positions, "coordinates", -999.999, 9999.999),
        _between(b_factors, "B factors", -99.99, 999.99),
    ):
        if not fits:
            raise ValueError(f"{path}: PDB holds {limit}; got {got}: write .cif")


def _check_mmcif_names(path: Path, residues: _Residues) -> None:
    """Refuses what has a meaning of its own in the format: gemmi writes label_asym_id without quotes."""
    for chain in residues.chain_id.tolist():
        if not re.fullmatch(r"(?!(data|save|loop|stop|global)_)[a-z0-9][\w.+-]*", chain, re.ASCII | re.IGNORECASE):
            raise ValueError(
                f"{path}: mmCIF takes chain names of letters and digits (then also _ . + -), none of its own words; "
                f"got {chain!r}: rename the chain"
            )


def _between(x: ndarray, what: str, low: float, high: float) -> tuple[bool, str, str]:
    return bool(x.min() >= low and x.max() <= high), f"{what} from {low} to {high}", f"{x.min()} to {x.max()}"


def _text(residues: _Residues, suffix: str, name: str | None, stem: str) -> str:
    """The file's contents."""
    gemmi = _gemmi("writing")
    structure = gemmi.Structure()
    structure.name = re.sub(r"[^\w.-]", "_", name or stem, flags=re.ASCII) or "protein"
    if name:
        structure.info["_struct.title"] = name
    model = gemmi.Model(1)
    entities: dict[tuple[str, ...], Any] = {}
    for chain in dict.fromkeys(residues.chain_id.tolist()):
        (members,) = np.nonzero(residues.chain_id == chain)
        if not residues.mask[members].any():
            continue
        sequence = tuple(RESTYPE_NAMES[aatype] for aatype in residues.aatype[members])
        entity = entities.setdefault(sequence, gemmi.Entity(str(len(entities) + 1)))
        entity.entity_type, entity.polymer_type = gemmi.EntityType.Polymer, gemmi.PolymerType.PeptideL
        entity.full_sequence, entity.subchains = list(sequence), [*entity.subchains, chain]
        model.add_chain(_chain(residues, chain, members, entity.name))
    structure.add_model(model)
    structure.entities = gemmi.EntityList(list(entities.values()))
    structure.assign_serial_numbers()
    if suffix.startswith(".pdb"):
        # No cell, which readers of CRYST1 would take for a periodic box of 1 Å.
        return structure.make_pdb_string(gemmi.PdbWriteOptions(cryst1_record=False))
    return structure.make_mmcif_document(
        gemmi.MmcifOutputGroups(False, **dict.fromkeys(MMCIF_GROUPS, True))
    ).as_string()


def _chain(residues: _Residues, name: str, members: ndarray, entity: str) -> Any:
    import gemmi

    chain = gemmi.Chain(name)
    for label_seq, i in enumerate(members, 1):
        residue = gemmi.Residue()
        residue.name = RESTYPE_NAMES[residues.aatype[i]]
        residue.seqid = gemmi.SeqId(int(residues.number[i]), residues.insertion_code[i] or " ")
        residue.het_flag, residue.entity_type = "A", gemmi.EntityType.Polymer
        residue.subchain, residue.entity_id, residue.label_seq = name, entity, label_seq
        for slot in np.flatnonzero(residues.mask[i]):
            atom = gemmi.Atom()
            atom.name, atom.element = ATOM_TYPES[slot], gemmi.Element(ATOM_TYPES[slot][0])
            atom.pos, atom.b_iso = gemmi.Position(*residues.atom37[i, slot]), residues.b_factor[i, slot]
            residue.add_atom(atom)
        if len(residue):
            chain.add_residue(residue)
    return chain
