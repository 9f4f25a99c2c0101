"""Judges of the structure module's functions: backbone update, torsions to atoms, FAPE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ipa_parity.checking.candidates import Framework
from ipa_parity.checking.pieces.atoms import ATOMS
from ipa_parity.checking.pieces.backbone_update import BACKBONE_UPDATE
from ipa_parity.checking.pieces.fape import FAPE
from ipa_parity.checking.pieces.piece import Piece, check_piece
from ipa_parity.checking.reporting import Report

__all__ = ["PIECES", "check_atoms", "check_backbone_update", "check_fape"]


def check_backbone_update(
    candidate: Callable,
    *,
    framework: Framework | None = None,
    dtypes: Sequence[str] = ("float32", "float64"),
    gradients: bool = True,
    seed: int = 0,
    name: str | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Report:
    """Checks a backbone update (Suppl. Alg. 23, and Alg. 20, line 10): new frames from frames and six numbers.

    The candidate takes `rotation` (N, 3, 3), `translation` (N, 3) and `update` (N, 6), which holds (b, c, d) of the
    quaternion (1, b, c, d) and then the translation in the residue's own frame. It returns the new rotation and
    translation, as a tuple or a dictionary. Arguments with these names are passed by name, others in this order.

    Args:
        candidate: a function of arrays.
        framework: "numpy", "torch" or "jax", the arrays that it takes; None to see which it uses.
        dtypes: dtypes to run in, "float32" or "float64".
        gradients: compare gradients to the inputs too, in PyTorch and JAX.
        seed: seed of all random numbers.
        name: name of the candidate in the report; None for its own.
        progress: called with a few words before each step.

    Returns:
        A report as of `ipa_parity.check`. Nothing that the candidate does raises here.

    Raises:
        ValueError: the candidate is no function, or a dtype is unknown.
    """
    options: dict[str, Any] = dict(framework=framework, gradients=gradients, seed=seed, name=name, progress=progress)
    return check_piece(BACKBONE_UPDATE, candidate, dtypes=tuple(dtypes), **options)


def check_atoms(
    candidate: Callable,
    *,
    framework: Framework | None = None,
    dtypes: Sequence[str] = ("float32", "float64"),
    gradients: bool = True,
    seed: int = 0,
    name: str | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Report:
    """Checks the atoms of backbone frames and torsions (Suppl. Alg. 24).

    The candidate takes `rotation` (N, 3, 3), `translation` (N, 3) in Å, `angles` (N, 7, 2), unit (sin, cos) of pre-ω,
    φ, ψ and χ1–χ4, and `aatype` (N), 0–20 in AlphaFold's order. It returns atoms (N, 14, 3) in Å, absent ones zero. See
    `check_backbone_update` for the other arguments, and for what it returns and raises.
    """
    options: dict[str, Any] = dict(framework=framework, gradients=gradients, seed=seed, name=name, progress=progress)
    return check_piece(ATOMS, candidate, dtypes=tuple(dtypes), **options)


def check_fape(
    candidate: Callable,
    *,
    framework: Framework | None = None,
    dtypes: Sequence[str] = ("float32", "float64"),
    gradients: bool = True,
    seed: int = 0,
    name: str | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Report:
    """Checks a frame aligned point error (Suppl. Alg. 28), clamped at 10 Å, in units of 10 Å, with ε = 1e-4.

    The candidate takes `predicted_rotation` (F, 3, 3), `predicted_translation` (F, 3), `true_rotation`,
    `true_translation`, `frame_mask` (F), `predicted_points` (P, 3), `true_points` and `point_mask` (P), lengths in Å.
    It returns a scalar. See `check_backbone_update` for the other arguments, and for what it returns and raises.
    """
    options: dict[str, Any] = dict(framework=framework, gradients=gradients, seed=seed, name=name, progress=progress)
    return check_piece(FAPE, candidate, dtypes=tuple(dtypes), **options)


PIECES: dict[str, tuple[Piece, Callable[..., Report]]] = {
    "backbone-update": (BACKBONE_UPDATE, check_backbone_update),
    "atoms": (ATOMS, check_atoms),
    "fape": (FAPE, check_fape),
}
"""Functions that can be judged, and their judges, by the names of the command."""
