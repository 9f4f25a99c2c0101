"""FAPE, the frame aligned point error: Algorithm 28."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ipa_bridge.proteins.frames import random_frames
from ipa_parity.attention.stages import Arrays
from ipa_parity.checking.formula import Array, Backend
from ipa_parity.checking.mistakes import Mistake
from ipa_parity.checking.pieces.piece import Options, Piece

CLAMP = 10.0
SCALE = 10.0
EPSILON = 1e-4
_LOCAL = "compare points in the local coordinates of every frame, Rᵀ(x − t), predicted with predicted, true with true"
_MEAN = "average over all pairs of a valid frame and a valid point"
_ERROR = "the error is √(|Δ|² + ε), clamped at 10 Å, then divided by 10 Å"


def _formula(options: Options, inputs: Mapping[str, Array], backend: Backend) -> dict[str, Array]:
    xp = backend.xp
    frames = {who: (inputs[f"{who}_rotation"], inputs[f"{who}_translation"]) for who in ("predicted", "true")}
    if options.get("frames") == "predicted for both":
        frames["true"] = frames["predicted"]
    predicted, true = (_local(options, *frames[who], inputs[f"{who}_points"], xp) for who in ("predicted", "true"))
    offset = predicted - true
    squares = (offset * offset).sum(-1)
    epsilon = options.get("epsilon", EPSILON)
    error = {
        "length": lambda: xp.sqrt(squares + epsilon),
        "squared": lambda: squares,
        "per coordinate": lambda: xp.sqrt(offset * offset + epsilon).sum(-1),
        "outside the root": lambda: xp.sqrt(squares) + epsilon,
    }[options.get("error", "length")]()
    scale, clamp = options.get("scale", SCALE), options.get("clamp", CLAMP)
    error = error / scale if options.get("clamped") == "after the scale" else error
    error = xp.where(error > clamp, 0 * error + clamp, error) if clamp else error
    error = error if options.get("clamped") == "after the scale" else error / scale
    frame, point = inputs["frame_mask"][:, None], inputs["point_mask"][None, :]
    weight = {
        "right": frame * point,
        "frames": frame + 0 * point,
        "points": point + 0 * frame,
        "none": 0 * frame * point + 1,
    }[options.get("mask", "right")]
    total = (weight * error).sum()
    number = (0 * weight + 1).sum() if options.get("mean") == "over all" else weight.sum()
    return {"loss": total if options.get("mean") == "sum" else total / (number + EPSILON)}


def _local(options: Options, rotation: Array, translation: Array, points: Array, xp: Any) -> Array:
    """Points (F, P, 3) in the coordinates of every frame (lines 1 and 2)."""
    form = options.get("local", "right")
    if form == "global":
        return points[None] + 0 * translation[:, None]
    shifted = points[None] if form == "rotated" else points[None] - translation[:, None]
    axes = "fxy" if form == "transposed" else "fyx"
    return shifted if form == "shifted" else xp.einsum(f"{axes},fpy->fpx", rotation, shifted)


def _draw(rng: np.random.Generator) -> Arrays:
    frames, points = 11, 17
    true = random_frames(rng, (frames,), spread=12.0)
    true_points = rng.uniform(-12, 12, (points, 3))
    turned, moved = random_frames(rng, (frames,), spread=3.0)
    exact = np.arange(frames)[:, None] < 3  # pairs without an error show ε
    predicted_points = true_points + rng.normal(0, 3, (points, 3)) * (np.arange(points)[:, None] > 2)
    return {
        "predicted_rotation": np.where(exact[..., None], true[0], turned),
        "predicted_translation": np.where(exact, true[1], true[1] + moved),
        "true_rotation": true[0],
        "true_translation": true[1],
        "frame_mask": (np.arange(frames) % 4 != 1).astype(np.float64),
        "predicted_points": predicted_points,
        "true_points": true_points,
        "point_mask": (np.arange(points) % 3 != 1).astype(np.float64),
    }


FAPE = Piece(
    title="FAPE",
    algorithm="28",
    arguments=(
        *("predicted_rotation", "predicted_translation", "true_rotation", "true_translation", "frame_mask"),
        *("predicted_points", "true_points", "point_mask"),
    ),
    outputs=(("loss", "loss"),),
    draw=_draw,
    formula=_formula,
    differentiable=("predicted_rotation", "predicted_translation", "predicted_points"),
    mistakes=(
        Mistake("points in global coordinates", "1, 2", _LOCAL, {"local": "global"}),
        Mistake("frames that are transposed", "1, 2", _LOCAL, {"local": "transposed"}),
        Mistake("R(x − t) instead of Rᵀ(x − t)", "1, 2", _LOCAL, {"local": "transposed"}),
        Mistake("points rotated but not translated", "1, 2", _LOCAL, {"local": "rotated"}),
        Mistake("points translated but not rotated", "1, 2", _LOCAL, {"local": "shifted"}),
        Mistake("predicted frames for the true points too", "2", _LOCAL, {"frames": "predicted for both"}),
        Mistake("squared errors", "3", _ERROR, {"error": "squared"}),
        Mistake("the sum of the coordinates' errors instead of the length", "3", _ERROR, {"error": "per coordinate"}),
        Mistake("ε outside the root", "3", _ERROR, {"error": "outside the root"}),
        Mistake("no ε in the root", "3", _ERROR, {"epsilon": 0.0}),
        Mistake("no clamp", "4", _ERROR, {"clamp": 0.0}),
        Mistake("the clamp after the division by the length scale", "4", _ERROR, {"clamped": "after the scale"}),
        Mistake("no division by the length scale", "4", _ERROR, {"scale": 1.0}),
        Mistake("the mask of frames alone", "4", _MEAN, {"mask": "frames"}),
        Mistake("the mask of points alone", "4", _MEAN, {"mask": "points"}),
        Mistake("no masks", "4", _MEAN, {"mask": "none"}),
        Mistake("the mean over masked pairs too", "4", _MEAN, {"mean": "over all"}),
        Mistake("the sum instead of the mean", "4", _MEAN, {"mean": "sum"}),
    ),
)
"""The loss of predicted and true frames (F) and points (P, 3) in Å, clamped at 10 Å, in units of 10 Å."""
