"""Fixtures of the weights' tests."""

from __future__ import annotations

import numpy as np
import pytest
from port_cases import ALPHAFOLD, SMALL_MODULE

from ipa_bridge.config import PredictedLDDTConfig
from ipa_bridge.weights import Weights


@pytest.fixture
def torch():
    """PyTorch; tests of ipa-port are skipped without it."""
    return pytest.importorskip("torch")


@pytest.fixture
def alphafold(tmp_path):
    """A file like AlphaFold's, with a structure module, a confidence head and other parts."""
    parts = {
        f"{ALPHAFOLD}/structure_module": Weights.random(SMALL_MODULE),
        f"{ALPHAFOLD}/predicted_lddt_head": Weights.random(PredictedLDDTConfig(num_channel=11)),
    }
    arrays = {
        f"{module}//{leaf}": x
        for root, weights in parts.items()
        for module, leaves in weights.to_haiku(root=root).items()
        for leaf, x in leaves.items()
    }
    arrays |= {f"{ALPHAFOLD}/evoformer/{name}//weights": np.ones((2, 2)) for name in ("a", "b")}
    path = tmp_path / "params.npz"
    np.savez(path, **arrays)
    return path
