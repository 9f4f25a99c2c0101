"""Other systems' parameters: how each names and lays out ours. A dialect more is a file and its row in `DIALECTS`."""

from __future__ import annotations

import os

from ipa_bridge.weights.dialects.alphafold import ALPHAFOLD, IPA_JAX, IPA_TORCH
from ipa_bridge.weights.dialects.esmfold import ESMFOLD
from ipa_bridge.weights.dialects.framediff import FRAMEDIFF, FRAMEFLOW
from ipa_bridge.weights.dialects.lucidrains import LUCIDRAINS
from ipa_bridge.weights.dialects.openfold import OPENFOLD, OPENFOLD_V1
from ipa_bridge.weights.dialects.spec import Dialect, Form, Transform, layout_of

__all__ = ["DIALECTS", "Dialect", "Form", "Transform", "default_dialect", "find_dialect", "layout_of"]

DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (ALPHAFOLD, IPA_JAX, IPA_TORCH, OPENFOLD, OPENFOLD_V1, ESMFOLD, FRAMEFLOW, FRAMEDIFF, LUCIDRAINS)
}
"""Every dialect by name."""


def find_dialect(name: str) -> Dialect:
    """The dialect of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in DIALECTS:
        raise ValueError(f"dialect must be one of {', '.join(DIALECTS)}; got {name!r}")
    return DIALECTS[name]


def default_dialect(path: str | os.PathLike[str]) -> str:
    """The dialect of ours for a file of that name: AlphaFold's haiku names in .npz, torch's in others."""
    return "ipa_jax" if os.fspath(path).endswith(".npz") else "ipa_torch"
