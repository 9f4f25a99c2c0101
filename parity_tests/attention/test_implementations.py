"""Every implementation of the attention that is registered: one list of names, and one function."""

from __future__ import annotations

import importlib
from functools import partial
from typing import get_args

import numpy as np
import pytest
from streamed_cases import core_arrays, judge

from ipa_bridge.config import Implementation

OF_ANY_SIZE = [name for name in get_args(Implementation) if name not in ("reference", "fused")]
"""Implementations that these small cases suit; test_fused.py has the sizes that the GPU kernels take."""


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_the_type_names_what_is_registered(framework):
    pytest.importorskip(framework)
    if framework == "jax":
        pytest.importorskip("haiku")
    registered = importlib.import_module(f"ipa_{framework}.attention").IMPLEMENTATIONS
    assert tuple(registered) == get_args(Implementation), (
        f"IMPLEMENTATIONS of ipa_{framework}/attention/__init__.py (left) and Implementation of "
        "ipa_bridge/attention_config.py (right) must have the same names in the same order"
    )


@pytest.mark.parametrize("options", [{}, {"pair": False, "mask": False, "shape": (2, 3, 5)}])
@pytest.mark.parametrize("implementation", OF_ANY_SIZE)
def test_it_is_the_reference(framework, implementation, options):
    """Outputs, attention weights and gradients, in float64."""
    arrays, cotangents = core_arrays(**options)
    run = partial(framework.run_attention, arrays, cotangents, return_attention=True)
    (outputs, gradients), (wanted, of_reference) = run(implementation=implementation), run(implementation="reference")
    for x, expected in zip(outputs, wanted, strict=True):
        judge(x, expected, "out", "float64")
    assert set(gradients) == set(of_reference)
    for name, expected in of_reference.items():
        judge(gradients[name], expected, f"gradient/{name}", "float64")


@pytest.mark.parametrize("implementation", OF_ANY_SIZE)
def test_no_residue_and_a_wholly_masked_chain_are_finite(framework, implementation):
    nothing = core_arrays((0,))
    hidden, cotangents = core_arrays()
    hidden["mask"] = np.zeros_like(hidden["mask"])
    for arrays, weights in (nothing, (hidden, cotangents)):
        outputs, gradients = framework.run_attention(arrays, weights, implementation=implementation)
        assert all(np.isfinite(x).all() for x in (*outputs, *gradients.values()))
