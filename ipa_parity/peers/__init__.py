"""Published implementations of IPA, run on our cases: independent references, with results under our names.

Each takes a case and returns `out` and gradients as `stages` does. The case's cotangent must be zero in masked rows,
because systems differ in what a masked query attends to. The system's dialect converts parameters and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ipa_parity.attention.stages import Arrays
from ipa_parity.peers.alphafold import (
    alphafold_forward,
    alphafold_structure_module,
    run_alphafold,
    run_alphafold_structure_module,
)
from ipa_parity.peers.esmfold import (
    esmfold_module,
    esmfold_structure_module,
    run_esmfold,
    run_esmfold_structure_module,
)
from ipa_parity.peers.lucidrains import lucidrains_module, run_lucidrains

__all__ = [
    "PEERS",
    "Peer",
    "alphafold_forward",
    "alphafold_structure_module",
    "esmfold_module",
    "esmfold_structure_module",
    "lucidrains_module",
    "run_alphafold",
    "run_alphafold_structure_module",
    "run_esmfold",
    "run_esmfold_structure_module",
    "run_lucidrains",
]


class Peer(NamedTuple):
    """One published implementation."""

    package: str
    """Name of the Python package to import."""
    run: Callable[..., Arrays]
    """Runs its attention on a case."""
    run_structure_module: Callable[..., Arrays] | None = None
    """Runs its structure module on a case; None if it has none."""


PEERS = {
    "alphafold": Peer("alphafold", run_alphafold, run_alphafold_structure_module),
    "esmfold": Peer("transformers", run_esmfold, run_esmfold_structure_module),
    "lucidrains": Peer("invariant_point_attention", run_lucidrains),
}
"""Published implementations by the dialect of their weights."""
