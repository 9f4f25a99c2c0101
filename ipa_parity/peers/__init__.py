"""Published implementations of IPA, run on our cases under our names: independent witnesses of what it is.

Each takes a case whose cotangent is zero in masked rows, since what a masked query attends to differs between
systems, and returns `out` and gradients as `stages` does. Parameters and their gradients go through its dialect.
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
    """The name by which it is imported."""
    run: Callable[..., Arrays]
    """Its attention on a case."""
    run_structure_module: Callable[..., Arrays] | None = None
    """Its structure module on a case, where it has one."""


PEERS = {
    "alphafold": Peer("alphafold", run_alphafold, run_alphafold_structure_module),
    "esmfold": Peer("transformers", run_esmfold, run_esmfold_structure_module),
    "lucidrains": Peer("invariant_point_attention", run_lucidrains),
}
"""By the dialect of its weights."""
