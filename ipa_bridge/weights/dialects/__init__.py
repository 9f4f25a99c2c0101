"""Other systems' names and layouts of our parameters. To add a dialect, add a file and list it in `DIALECTS`."""

from __future__ import annotations

import os

from ipa_bridge.weights.dialects.abodybuilder2 import ABODYBUILDER2
from ipa_bridge.weights.dialects.abodybuilder3 import ABODYBUILDER3, IBEX
from ipa_bridge.weights.dialects.alphafold import ALPHAFOLD, IPA_JAX, IPA_TORCH
from ipa_bridge.weights.dialects.bioemu import BIOEMU
from ipa_bridge.weights.dialects.esmfold import ESMFOLD
from ipa_bridge.weights.dialects.flashabb import FLASHABB
from ipa_bridge.weights.dialects.framediff import FRAMEDIFF, FRAMEFLOW
from ipa_bridge.weights.dialects.lociparse import LOCIPARSE
from ipa_bridge.weights.dialects.lucidrains import IGFOLD, LUCIDRAINS
from ipa_bridge.weights.dialects.mdgen import MDGEN
from ipa_bridge.weights.dialects.omegafold import OMEGAFOLD
from ipa_bridge.weights.dialects.openfold import OPENFOLD, OPENFOLD_V1
from ipa_bridge.weights.dialects.spec import OTHERS, Dialect, Form, Order, Row, Transform, layout_of
from ipa_bridge.weights.dialects.unifold import UNIFOLD

__all__ = [
    "DIALECTS",
    "OTHERS",
    "Dialect",
    "Form",
    "Order",
    "Row",
    "Transform",
    "default_dialect",
    "find_dialect",
    "layout_of",
]

DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        *(ALPHAFOLD, IPA_JAX, IPA_TORCH, OPENFOLD, OPENFOLD_V1, ESMFOLD, FRAMEFLOW, FRAMEDIFF, LUCIDRAINS),
        *(ABODYBUILDER2, ABODYBUILDER3, BIOEMU, FLASHABB, IBEX, IGFOLD, LOCIPARSE, MDGEN, OMEGAFOLD, UNIFOLD),
    )
}
"""Every dialect by name."""


def find_dialect(name: str) -> Dialect:
    """The dialect of that name.

    Raises:
        ValueError: there is no such dialect.
    """
    if name not in DIALECTS:
        raise ValueError(f"dialect must be one of {', '.join(DIALECTS)}; got {name!r}")
    return DIALECTS[name]


def default_dialect(path: str | os.PathLike[str]) -> str:
    """Our own dialect for a file: AlphaFold's haiku names for .npz, torch names for other suffixes."""
    return "ipa_jax" if os.fspath(path).endswith(".npz") else "ipa_torch"
