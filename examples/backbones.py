"""Data for the denoising examples: backbones of peptides or proteins, noise, model inputs, scores and plots.

This uses numpy only, so that the examples of both frameworks get the same numbers.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ipa_bridge import IPABlockConfig, IPAConfig, IPATransformerConfig, load_structure, save_structure
from ipa_bridge.proteins.frames import HELIX, STRAND, TURN, backbone_frames, build_backbone
from ipa_bridge.proteins.residues import ATOM14_NAMES, ATOM14_POSITIONS, ATOM_TYPES, RESTYPES

LENGTH = 40
"""Number of residues in each training chain."""

ROTATION_NOISE, TRANSLATION_NOISE = 0.4, 2.0
"""Standard deviations of each component of a rotation vector (radians) and of a translation (Å)."""

LEARNING_RATE = 1e-3
"""Learning rate of Adam."""

CHANNELS, FARTHEST = 64, 16
"""Width of the single representation, and the largest offset along the chain in the pair representation."""


@dataclass(frozen=True)
class Backbones:
    """Frames of several chains of one length, in Å."""

    rotation: np.ndarray  # (chains, N, 3, 3)
    translation: np.ndarray  # (chains, N, 3)
    mask: np.ndarray  # (chains, N) bool

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, index: np.ndarray | slice | int) -> Backbones:
        return Backbones(self.rotation[index], self.translation[index], self.mask[index])

    def noised(self, rng: np.random.Generator) -> Backbones:
        """A copy in which every frame is rotated and moved at random, on its own."""
        vector = ROTATION_NOISE * rng.standard_normal(self.translation.shape)
        angle = np.linalg.norm(vector, axis=-1, keepdims=True)[..., None]
        x, y, z = np.moveaxis(vector, -1, 0)
        zero = np.zeros_like(x)
        cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(*x.shape, 3, 3)
        turn = np.eye(3) + np.sin(angle) / angle * cross + (1 - np.cos(angle)) / angle**2 * (cross @ cross)
        shift = TRANSLATION_NOISE * rng.standard_normal(self.translation.shape)
        return replace(self, rotation=self.rotation @ turn, translation=self.translation + shift)

    def astype(self, dtype: type) -> Backbones:
        """A copy with frames of another dtype."""
        return replace(self, rotation=self.rotation.astype(dtype), translation=self.translation.astype(dtype))


def model_config() -> IPATransformerConfig:
    """Config of three blocks with frames in Å; the attention scales them to nm."""
    ipa = replace(
        IPAConfig.alphafold2(),
        num_channel=CHANNELS,
        pair_channel=2 * FARTHEST + 1,
        num_head=4,
        position_scale=10.0,
        frame_unit=1.0,
    )
    return IPATransformerConfig(block=IPABlockConfig(ipa=ipa), num_layer=3)


def features(chains: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Single and pair representations: the position of each residue, and the offset of each pair, along the chain."""
    position = np.arange(length)
    frequency = 10.0 ** np.linspace(0, -3, CHANNELS // 2)
    single = np.concatenate([f(position[:, None] * frequency) for f in (np.sin, np.cos)], -1)
    offset = np.clip(position[None] - position[:, None], -FARTHEST, FARTHEST) + FARTHEST
    pair = np.eye(2 * FARTHEST + 1, dtype=np.float32)[offset]
    return tuple(np.broadcast_to(x, (chains, *x.shape)) for x in (single.astype(np.float32), pair))


def inputs(noised: Backbones, *, alone: bool = False) -> dict[str, np.ndarray]:
    """Model inputs by name; `alone` makes every residue a chain of its own, so that it attends only to itself."""
    single, pair = features(*noised.mask.shape)
    arrays = {"single": single, "pair": pair, **vars(noised)}
    if alone:
        arrays["pair"] = np.moveaxis(np.diagonal(pair, axis1=1, axis2=2), -1, 1)[:, :, None]
        arrays = {name: x.reshape(-1, 1, *x.shape[2:]) for name, x in arrays.items()}
    return {name: np.ascontiguousarray(x) for name, x in arrays.items()}


def peptides(number: int, seed: int) -> Backbones:
    """Random chains of helices, strands and turns with ideal bonds and angles."""
    rng = np.random.default_rng(seed)
    chains = []
    for _ in range(number):
        dihedrals: list[tuple[float, float]] = []
        while len(dihedrals) < LENGTH:
            kind, length = rng.integers(2), int(rng.integers(6, 15))
            dihedrals += [(HELIX, STRAND)[kind]] * length + list(TURN)
        wobble = rng.normal(0, 5, (LENGTH, 2))
        angles = [(phi + a, psi + b) for (phi, psi), (a, b) in zip(dihedrals[:LENGTH], wobble, strict=True)]
        rotation, translation = backbone_frames(*build_backbone(angles))
        chains.append((rotation, translation - translation.mean(0)))
    rotations, translations = (np.stack(x) for x in zip(*chains, strict=True))
    return Backbones(rotations, translations, np.ones(translations.shape[:2], bool)).astype(np.float32)


def structure_files(folder: Path) -> list[Path]:
    """The PDB and mmCIF files in a folder; fewer than two raise ValueError."""
    if not folder.is_dir():
        raise ValueError(f"no such folder: {folder}")
    kinds = (".pdb", ".cif", ".pdb.gz", ".cif.gz")
    files = sorted(path for path in folder.iterdir() if path.name.lower().endswith(kinds))
    if len(files) < 2:
        raise ValueError(f"{folder}: expected at least two structures ({', '.join(kinds)}); got {len(files)}")
    return files


def number_of_steps(text: str) -> int:
    """Parses a command-line argument that must be 1 or more."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1; got {text!r}")
    return int(text)


def folder_to_write(text: str) -> Path:
    """Parses a folder to write to; checks before training that it can be written or created."""
    folder = Path(text)
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a folder that can be written to; got {there}")
    return folder


def folder_of_structures(text: str) -> Path:
    """Parses a folder that must hold at least two structure files."""
    try:
        structure_files(Path(text))
    except (ValueError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)


def proteins(folder: Path) -> list[Backbones]:
    """Windows of `LENGTH` residues from the chains in a folder's files, one entry per file.

    Residues without a backbone are masked. A file without a chain of that length, or without any backbone, is skipped.
    """
    found = []
    for path in structure_files(folder):
        structure = load_structure(path)
        windows = []
        for chain in dict.fromkeys(structure.chain_id):
            (where,) = np.nonzero(structure.chain_id == chain)
            for start in range(0, len(where) - LENGTH + 1, LENGTH // 2):
                window = where[start : start + LENGTH]
                if not structure.mask[window].any():
                    continue
                centre = structure.translation[window][structure.mask[window]].mean(0)
                translation = structure.translation[window] - centre
                windows.append((structure.rotation[window], translation, structure.mask[window]))
        if windows:
            found.append(Backbones(*(np.stack(x) for x in zip(*windows, strict=True))).astype(np.float32))
    return found


def training_and_held_out(folder: Path | None) -> tuple[Backbones, Backbones]:
    """Chains to train on and chains held out: peptides, or a folder's structures with the last file held out."""
    if folder is None:
        return peptides(128, seed=1), peptides(16, seed=2)
    found = proteins(folder)
    if len(found) < 2:
        raise ValueError(
            f"{folder}: expected chains of {LENGTH} residues with a backbone in at least two files; got {len(found)}"
        )
    *known, unseen = found
    joined = (np.concatenate([getattr(x, field) for x in known]) for field in ("rotation", "translation", "mask"))
    return Backbones(*joined), unseen


def batches(clean: Backbones, steps: range, size: int = 8, seed: int = 0) -> Iterator[tuple[Backbones, Backbones]]:
    """Noised and clean chains for each step; the same seed gives the same chains."""
    for step in steps:
        rng = np.random.default_rng((seed, step))
        chosen = clean[rng.integers(0, len(clean), size)]
        yield chosen.noised(rng).astype(np.float32), chosen


@dataclass(frozen=True)
class Score:
    """Mean error of frames, after superposition of each chain's Cα atoms."""

    rmsd: float
    """RMSD of Cα atoms, Å."""
    angle: float
    """Mean angle between frames, degrees."""

    def __str__(self) -> str:
        return f"{self.rmsd:.2f} Å, {self.angle:.0f}°"


def score(predicted: Backbones, truth: Backbones) -> Score:
    """The score of predicted frames over all valid residues."""
    squares, angles = [], []
    for rotation, ca, true_rotation, true_ca, mask in zip(
        predicted.rotation, predicted.translation, truth.rotation, truth.translation, truth.mask, strict=True
    ):
        turn, placed = superpose(ca[mask].astype(np.float64), true_ca[mask].astype(np.float64))
        squares.append(((placed - true_ca[mask]) ** 2).sum(-1))
        cosine = (np.einsum("nxy,nxy->n", turn @ rotation[mask], true_rotation[mask]) - 1) / 2
        angles.append(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
    return Score(float(np.sqrt(np.concatenate(squares).mean())), float(np.concatenate(angles).mean()))


def superpose(points: np.ndarray, onto: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best rotation of points onto others, and the moved points (Kabsch, Acta Cryst. A32 (1976) 922)."""
    centre, other = points.mean(0), onto.mean(0)
    u, _, v = np.linalg.svd((points - centre).T @ (onto - other))
    turn = (u @ np.diag([1, 1, np.sign(np.linalg.det(u @ v))]) @ v).T
    return turn, (points - centre) @ turn.T + other


def write_pdb(path: Path, chain: Backbones) -> None:
    """Writes one chain's N, Cα, C and Cβ as poly-alanine."""
    alanine = RESTYPES.index("A")
    number = len(chain.translation)
    atom37, mask = np.zeros((number, 37, 3)), np.zeros((number, 37), bool)
    for name, local in zip(ATOM14_NAMES[alanine], ATOM14_POSITIONS[alanine], strict=True):
        if name in ("N", "CA", "C", "CB"):
            atom37[:, ATOM_TYPES.index(name)] = chain.rotation @ local + chain.translation
            mask[:, ATOM_TYPES.index(name)] = chain.mask
    save_structure(path, atom37, np.full(number, alanine), atom37_mask=mask)


def plot_losses(path: Path, curves: Mapping[str, Sequence[float]], title: str) -> None:
    """Plots loss over steps, one line per name, into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for i, (name, losses) in enumerate(curves.items()):
        axes.plot(losses, label=name, linewidth=1.5 if i == 0 else 1.0, linestyle=("-", "--", ":", "-.")[i % 4])
    axes.set(xlabel="step", ylabel="FAPE, Å / 10", title=title)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(
    out: Path, losses: Mapping[str, Sequence[float]], held_out: Mapping[str, Backbones], truth: Backbones
) -> str:
    """Writes the loss curve and the first held-out chain before and after; returns the held-out scores as text."""
    out.mkdir(parents=True, exist_ok=True)
    plot_losses(out / "loss.png", losses, "denoising backbones")
    for name, chains in (("truth", truth), *held_out.items()):
        write_pdb(out / f"{name.replace(' ', '_')}.pdb", chains[0])
    lines = [f"{len(truth)} held-out chains of {truth.mask.shape[1]} residues: Cα RMSD and mean angle of the frames"]
    lines += [f"  {name:20} {score(chains, truth)}" for name, chains in held_out.items()]
    return "\n".join([*lines, f"loss curve and structures are in {out}"])
