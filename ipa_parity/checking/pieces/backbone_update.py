"""The backbone update: Algorithm 23, and its composition with the frames (Algorithm 20, line 10)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ipa_bridge.proteins.frames import random_frames
from ipa_parity.attention.stages import Arrays
from ipa_parity.checking.formula import Array, Backend
from ipa_parity.checking.mistakes import Mistake
from ipa_parity.checking.pieces.piece import Options, Piece

_COMPOSE = "compose from the right: R ← R·R_update and t ← R·t_update + t, with the frame before the update"
_QUATERNION = "the quaternion is (1, b, c, d), divided by its length"


def _formula(options: Options, inputs: Mapping[str, Array], backend: Backend) -> dict[str, Array]:
    xp, rotation, t, update = backend.xp, inputs["rotation"], inputs["translation"], inputs["update"]
    vector, shift = update[..., :3], update[..., 3:]
    if options.get("order") == "translation first":
        vector, shift = shift, vector
    vector = options.get("sign", 1.0) * vector
    one = options.get("real", 1.0) + 0 * vector[..., :1]
    parts = [vector, one] if options.get("real_part") == "last" else [one, vector]
    quaternion = xp.concatenate(parts, -1)
    if options.get("normalised", True):
        quaternion = quaternion / xp.sqrt((quaternion * quaternion).sum(-1)[..., None])
    turn = _matrix(quaternion, xp)
    composed = turn @ rotation if options.get("composed") == "left" else rotation @ turn
    if options.get("rotation") == "not composed":
        composed = turn
    axes = {"current": ("xy", rotation), "new": ("xy", composed), "inverse": ("yx", rotation), "update": ("yx", turn)}
    where = options.get("translation", "current")
    moved = t if where == "update" else shift
    if where != "none":
        letters, matrix = axes[where]
        moved = xp.einsum(f"...{letters},...y->...x", matrix, moved)
    moved = options.get("unit", 1.0) * moved
    return {"rotation": composed, "translation": moved if options.get("replaced") else t + moved}


def _matrix(quaternion: Array, xp: Any) -> Array:
    """Rotations of quaternions (w, x, y, z); a matrix scaled by the squared length if that is not 1."""
    w, x, y, z = (quaternion[..., i] for i in range(4))
    rows = [
        [w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z],
    ]
    return xp.stack([xp.stack(row, -1) for row in rows], -2)


def _draw(rng: np.random.Generator) -> Arrays:
    rotation, translation = random_frames(rng, (13,), spread=2.0)
    return {"rotation": rotation, "translation": translation, "update": rng.standard_normal((13, 6))}


BACKBONE_UPDATE = Piece(
    title="backbone update",
    algorithm="23",
    arguments=("rotation", "translation", "update"),
    outputs=(("rotation", "rotation"), ("translation", "translation")),
    draw=_draw,
    formula=_formula,
    differentiable=("rotation", "translation", "update"),
    mistakes=(
        Mistake("a quaternion that is not normalised", "2", _QUATERNION, {"normalised": False}),
        Mistake("the quaternion's update added to it, q + q·(1, b, c, d)", "2", _QUATERNION, {"real": 2.0}),
        Mistake("0 as the quaternion's real part", "2", _QUATERNION, {"real": 0.0}),
        Mistake("the quaternion's real part last", "2", _QUATERNION, {"real_part": "last"}),
        Mistake("the opposite sign of (b, c, d)", "2", _QUATERNION, {"sign": -1.0}),
        Mistake("the transposed rotation of the update", "3", _QUATERNION, {"sign": -1.0}),
        Mistake(
            "the translation first in the six numbers", "1", "they are b, c, d, then t", {"order": "translation first"}
        ),
        Mistake("the update composed from the left", "3", _COMPOSE, {"composed": "left"}),
        Mistake("the new rotation not composed with the old one", "3", _COMPOSE, {"rotation": "not composed"}),
        Mistake("the translation's update rotated by the new frame", "3", _COMPOSE, {"translation": "new"}),
        Mistake("the translation's update not rotated", "3", _COMPOSE, {"translation": "none"}),
        Mistake("the translation's update rotated by the inverse frame", "3", _COMPOSE, {"translation": "inverse"}),
        Mistake("t ← R_updateᵀ·t + t", "3", _COMPOSE, {"translation": "update"}),
        Mistake("the translation replaced, not added to", "3", _COMPOSE, {"replaced": True}),
        Mistake(
            "the translation's update ten times too large", "3", "the update is in the frames' unit", {"unit": 10.0}
        ),
        Mistake(
            "the translation's update ten times too small", "3", "the update is in the frames' unit", {"unit": 0.1}
        ),
    ),
)
"""The backbone update: rotation, translation and the six numbers (b, c, d, t) to the new rotation and translation."""
