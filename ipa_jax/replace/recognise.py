"""Finds AlphaFold's modules that define attentions."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from ipa_bridge.config import IPAConfig

SYSTEMS = {
    "alphafold.model.folding": IPAConfig.alphafold2(),
    "alphafold.model.folding_multimer": IPAConfig.alphafold_multimer(),
}
"""Attention that each module of DeepMind's or ColabFold's package defines."""


def find_attentions() -> dict[str, tuple[ModuleType, IPAConfig]]:
    """AlphaFold's modules that define attentions, each with its attention's config, by module name.

    Raises:
        ValueError: there is no `alphafold` package, or it cannot be imported.
    """
    try:
        modules = {name: importlib.import_module(name) for name in SYSTEMS if _exists(name)}
    except ImportError as broken:
        raise ValueError(f"AlphaFold's package is installed but cannot be imported: {broken}") from broken
    if not modules:
        raise ValueError(
            f"DeepMind's or ColabFold's package alphafold was expected, with {' or '.join(SYSTEMS)}; neither can be "
            "imported: install one, or use ipa_jax.InvariantPointAttention in your own module"
        )
    return {name: (module, SYSTEMS[name]) for name, module in modules.items()}


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
