"""Fixtures of the losses' tests."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("loss_frameworks")

from loss_frameworks import Jax, Torch, one_of
from loss_problems import load_problem, synthetic_problem


@pytest.fixture(scope="module", params=["2rbg.pdb", "every residue type"])
def problem(request):
    if request.param == "every residue type":
        return synthetic_problem()
    pytest.importorskip("gemmi")
    return load_problem(request.getfixturevalue("structures_dir") / request.param)


@pytest.fixture(scope="module", params=[Jax, Torch], ids=["jax", "torch"])
def framework(request):
    return one_of(request.param)
