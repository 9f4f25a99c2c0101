"""Inputs of the GPU kernels, and the judgement of their outputs."""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest

from ipa_parity.report import compare

RAGGED = {
    "float32": {"shape": (1, 37), "heads": 3, "width": 32},
    "bfloat16": {"shape": (1, 37), "heads": 3, "width": 32, "pair_dtype": "bfloat16"},
    "batch, no mask": {"shape": (2, 2, 5), "heads": 2, "width": 64, "mask": False},
    "no pair": {"shape": (2, 19), "heads": 5, "width": None},
    "alphafold": {"shape": (1, 20), "heads": 12, "width": 128, "widths": (16, 16, 4, 8)},
    "all heads": {"shape": (1, 3), "heads": 16, "width": 256, "pair_dtype": "bfloat16"},
    "wide heads": {"shape": (1, 5), "heads": 2, "width": 32, "widths": (40, 30, 9, 11)},
    "one residue": {"shape": (1, 1), "heads": 2, "width": 32},
    "none": {"shape": (1, 0), "heads": 2, "width": 32},
    "key mask": {"shape": (2, 37), "heads": 3, "width": 32, "key_mask": True},
    "pair without a bias": {"shape": (1, 19), "heads": 3, "width": 32, "pair_bias": False},
    "no example": {"shape": (0, 5), "heads": 2, "width": 32},
    "no example, no pair": {"shape": (2, 0, 5), "heads": 2, "width": None},
}


def arrays_of(
    shape,
    heads,
    width,
    *,
    widths=(5, 2, 3, 7),
    mask=True,
    key_mask=False,
    pair_bias=True,
    pair_dtype="float32",
    spread=1.0,
    seed=0,
):
    """Arguments of `point_attention` by name, and cotangents of its outputs; a bfloat16 pair is rounded to bfloat16."""
    rng = np.random.default_rng(seed)
    *batch, n = shape
    c, cv, p, pv = widths

    def draw(*shape):
        return rng.standard_normal(shape).astype("float32")

    centre = spread * draw(*batch, n, 1, 1, 3)
    arrays = {
        "q": draw(*batch, n, heads, c),
        "k": draw(*batch, n, heads, c),
        "v": draw(*batch, n, heads, cv),
        "q_points": centre + draw(*batch, n, heads, p, 3),
        "k_points": centre + draw(*batch, n, heads, p, 3),
        "v_points": draw(*batch, n, heads, pv, 3),
        "pair": None if width is None else draw(*batch, n, n, width),
        "pair_bias_weight": draw(width, heads) / 3 if width and pair_bias else None,
        "point_weights": abs(draw(heads)),
        "mask": (rng.random((*batch, n)) > 0.2).astype("float32") if mask else None,
    }
    if key_mask:  # valid queries of the last example may read no key
        arrays["key_mask"] = (rng.random((*batch, n)) > 0.3).astype("float32")
        arrays["key_mask"][..., 1] = 1
        arrays["key_mask"][-1] *= 1 - arrays["mask"][-1]
    if pair_dtype == "bfloat16":
        import ml_dtypes

        arrays["pair"] = arrays["pair"].astype(ml_dtypes.bfloat16)
    cotangents = [draw(*batch, n, heads, cv), draw(*batch, n, heads, pv, 3)]
    return arrays, cotangents + ([draw(*batch, n, heads, width)] if width else [])


def widened(arrays):
    return {name: None if x is None else x.astype("float64") for name, x in arrays.items()}


def run(framework, arrays, cotangents, **options):
    """Outputs and gradients of the core, in float64."""
    with framework.as_kernels_need(arrays):
        outputs, gradients = framework.run_attention(arrays, cotangents, **options)
    return [x.astype(float) for x in outputs], {name: x.astype(float) for name, x in gradients.items()}


def judge_against_the_reference(framework, arrays, cotangents):
    """Judges results against float64, in eps of float32; the pair's gradient in eps of the pair's dtype."""
    outputs, gradients = run(framework, arrays, cotangents, implementation="fused")
    exact = run(framework, widened(arrays), cotangents, implementation="reference")
    names = {"case": "fused", "subject": framework.name, "reference": "reference"}
    rows = []
    for x, e in zip(outputs, exact[0], strict=True):
        rows.append(compare(x, e, stage="out", dtype="float32", **names))
    # With one key, gradients of logits cancel to zero; their error is divided by the size of the terms.
    scale = max(abs(x).max(initial=0) for x in cotangents)
    assert set(gradients) == set(exact[1])
    for name, e in exact[1].items():
        known = {"scale": max(scale, abs(e).max(initial=0)), **names}
        dtype = arrays["pair"].dtype.name if name == "pair" else "float32"
        rows.append(compare(gradients[name], e, stage=f"gradient/{name}", dtype=dtype, **known))
    failed = [str(row) for row in rows if not row.passed]
    assert not failed, "\n".join(failed)


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # conftest sets it, except in runs on a GPU
interpreted = pytest.mark.usefixtures("interpreted")


def without_triton() -> str:
    """The reason why PyTorch's kernels can neither run nor be interpreted; empty if they can."""
    if not importlib.util.find_spec("torch"):
        return "no torch"
    from ipa_torch.attention import fused

    installed, oldest = fused._installed_triton(), fused.OLDEST_TRITON
    if INTERPRETED:  # Triton 3.6's interpreter fails under newer versions of numpy
        oldest = max(oldest, (3, 7))
    return "" if installed and installed >= oldest else f"triton is {installed}"


needs_triton = pytest.mark.skipif(bool(without_triton()), reason=without_triton())
