"""Inputs of the attention's core, and the comparison of its outputs."""

from __future__ import annotations

import numpy as np

from ipa_parity.report import compare


def first(arrays):
    return [arrays[name] for name in ("q", "k", "v", "q_points", "k_points", "v_points", "pair")]


def rest(arrays):
    return {name: arrays[name] for name in ("pair_bias_weight", "point_weights")}


def core_arrays(shape=(9,), *, pair=True, mask=True, spread=1.0, dtype="float64", seed=0):
    """Random inputs of the core, with all widths different; frames lie in compact groups that may be far apart."""
    rng = np.random.default_rng(seed)
    *batch, n = shape
    heads, c, cv, p, pv, cz = 3, 4, 2, 5, 7, 6
    r = lambda *s: rng.standard_normal((*batch, *s))  # noqa: E731
    centre = (
        np.repeat(spread * rng.uniform(-1, 1, (*batch, n, 1, 1, 3)), 3, -4)[..., :n, :, :, :] if n else r(0, 1, 1, 3)
    )
    arrays = {
        "q": r(n, heads, c),
        "k": r(n, heads, c),
        "v": r(n, heads, cv),
        "q_points": centre + r(n, heads, p, 3),
        "k_points": centre + r(n, heads, p, 3),
        "v_points": r(n, heads, pv, 3),
        "pair": r(n, n, cz) if pair else None,
        "pair_bias_weight": rng.standard_normal((cz, heads)) / 3 if pair else None,
        "point_weights": rng.random(heads),
        "mask": (rng.random((*batch, n)) > 0.2).astype(float) if mask else None,
    }
    cotangents = [r(n, heads, cv), r(n, heads, pv, 3), *([r(n, heads, cz)] if pair else []), r(heads, n, n)]
    return {n: None if x is None else x.astype(dtype) for n, x in arrays.items()}, [x.astype(dtype) for x in cotangents]


def judge(actual, expected, stage, dtype, conditioning=1.0):
    names = {"case": "core", "stage": stage, "dtype": dtype, "subject": "tested", "reference": "the reference"}
    row = compare(np.asarray(actual, np.float64), np.asarray(expected, np.float64), **names, conditioning=conditioning)
    assert row.passed, str(row)
