"""Torsions to atoms: Algorithm 24, with the rotations of Algorithm 25."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ipa_bridge.proteins import residues
from ipa_bridge.proteins.frames import random_frames
from ipa_parity.attention.stages import Arrays
from ipa_parity.checking.formula import Array, Backend
from ipa_parity.checking.mistakes import Mistake
from ipa_parity.checking.pieces.piece import Options, Piece

_ANGLES = "angles are (sin, cos) of pre-ω, φ, ψ, χ1–χ4, which turn groups 1–7"
_FRAMES = "an atom lies at R·x + t of its group, whose frame is parent · default frame · rotation about x"
PARENTS = (0, 0, 0, 0, 0, 4, 5, 6)
"""Groups whose frames the rigid groups stand in."""


def _formula(options: Options, inputs: Mapping[str, Array], backend: Backend) -> dict[str, Array]:
    xp, aatype = backend.xp, np.asarray(inputs["aatype"])
    like = inputs["translation"]
    rotation, translation = inputs["rotation"], options.get("unit", 1.0) * like
    if options.get("backbone") == "transposed":
        rotation = rotation.swapaxes(-1, -2)
    if options.get("backbone") == "left out":
        rotation, translation = 0 * rotation + _constant(np.eye(3), like, xp), 0 * translation
    angles = inputs["angles"]
    sin, cos = angles[..., 0], options.get("cos", 1.0) * angles[..., 1]
    if options.get("angles") == "cos first":
        sin, cos = cos, sin
    sin = options.get("sign", 1.0) * sin
    order = {"right": range(7), "φ and ψ exchanged": [0, 2, 1, 3, 4, 5, 6], "shifted": [6, 0, 1, 2, 3, 4, 5]}
    taken = list(order[options.get("torsions", "right")])
    rotations, origins = [rotation], [translation]
    for group, torsion in enumerate(taken, 1):
        turn = _about_x(sin[..., torsion], cos[..., torsion], xp)
        parent = 0 if options.get("parents") == "backbone" else PARENTS[group]
        default = _constant(residues.GROUP_ROTATION[aatype, group], like, xp)
        local = turn @ default if options.get("turn") == "left" else default @ turn
        moved = xp.einsum(
            "...xy,...y->...x", rotations[parent], _constant(residues.GROUP_TRANSLATION[aatype, group], like, xp)
        )
        rotations.append(rotations[parent] @ local)
        origins.append(moved + origins[parent])
    groups, centres = xp.stack(rotations, -3), xp.stack(origins, -2)
    rows = np.arange(len(aatype))[:, None]
    chosen = residues.ATOM14_GROUP[aatype]
    if options.get("atoms") == "backbone":
        chosen = 0 * chosen
    axes = "...yx" if options.get("atoms") == "transposed" else "...xy"
    positions = _constant(residues.ATOM14_POSITIONS[aatype], like, xp)
    placed = xp.einsum(f"{axes},...y->...x", groups[rows, chosen], positions) + centres[rows, chosen]
    present = _constant(residues.ATOM14_MASK[aatype][..., None], like, xp)
    return {"atom14": placed if options.get("absent") == "placed" else placed * present}


def _about_x(sin: Array, cos: Array, xp: Any) -> Array:
    """Rotations about x (Alg. 25)."""
    zero, one = 0 * sin, 0 * sin + 1
    rows = [[one, zero, zero], [zero, cos, -sin], [zero, sin, cos]]
    return xp.stack([xp.stack(row, -1) for row in rows], -2)


def _constant(x: np.ndarray, like: Array, xp: Any) -> Array:
    return x.astype(like.dtype) if xp is np else xp.asarray(np.asarray(x), dtype=like.dtype)


def _draw(rng: np.random.Generator) -> Arrays:
    rotation, translation = random_frames(rng, (21,), spread=20.0)
    angles = rng.standard_normal((21, 7, 2))
    return {
        "rotation": rotation,
        "translation": translation,
        "angles": angles / np.linalg.norm(angles, axis=-1, keepdims=True),
        "aatype": rng.permutation(21),
    }


ATOMS = Piece(
    title="torsions to atoms",
    algorithm="24",
    arguments=("rotation", "translation", "angles", "aatype"),
    outputs=(("atom14", "atom14"),),
    draw=_draw,
    formula=_formula,
    differentiable=("rotation", "translation", "angles"),
    mistakes=(
        Mistake("cos before sin in the angles", "1", _ANGLES, {"angles": "cos first"}),
        Mistake("angles of the opposite sign", "1", _ANGLES, {"sign": -1.0}),
        Mistake("rotations about x that are transposed", "1", _ANGLES, {"sign": -1.0}),
        Mistake("angles turned by half a circle", "1", _ANGLES, {"sign": -1.0, "cos": -1.0}),
        Mistake("φ and ψ exchanged", "2–4", _ANGLES, {"torsions": "φ and ψ exchanged"}),
        Mistake("each group turned by the torsion before its own", "2–9", _ANGLES, {"torsions": "shifted"}),
        Mistake("χ2–χ4 on the backbone instead of the group before", "7–9", _FRAMES, {"parents": "backbone"}),
        Mistake("the rotation about x from the left of the default frame", "3–9", _FRAMES, {"turn": "left"}),
        Mistake("backbone rotations transposed", "2", _FRAMES, {"backbone": "transposed"}),
        Mistake("row-vector frames of the backbone", "2", _FRAMES, {"backbone": "transposed"}),
        Mistake("no backbone frames", "2", _FRAMES, {"backbone": "left out"}),
        Mistake("atoms placed with the transposed rotations of their groups", "11", _FRAMES, {"atoms": "transposed"}),
        Mistake("all atoms placed with the backbone's frame", "11", _FRAMES, {"atoms": "backbone"}),
        Mistake("absent atoms that are not zero", "11", "multiply by the mask of atoms", {"absent": "placed"}),
        Mistake("translations ten times too small", "2", "frames are in Å", {"unit": 0.1}),
        Mistake("translations ten times too large", "2", "frames are in Å", {"unit": 10.0}),
    ),
)
"""Atoms (N, 14, 3) in Å from backbone frames in Å, unit (sin, cos) of seven torsions (N, 7, 2) and residue types."""
