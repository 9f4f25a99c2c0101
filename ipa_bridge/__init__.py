"""Shared base of IPA Twins: configurations, weights, structures and a float64 oracle. Importing it needs numpy only."""

from ipa_bridge.config import (
    IPABlockConfig,
    IPAConfig,
    IPATransformerConfig,
    PredictedLDDTConfig,
    StructureModuleConfig,
)
from ipa_bridge.proteins import Structure, load_structure, save_structure
from ipa_bridge.version import __version__
from ipa_bridge.weights import Weights
from ipa_bridge.weights.registration import register_dialect, unregister_dialect

__all__ = [
    "IPABlockConfig",
    "IPAConfig",
    "IPATransformerConfig",
    "PredictedLDDTConfig",
    "Structure",
    "StructureModuleConfig",
    "Weights",
    "__version__",
    "load_structure",
    "register_dialect",
    "save_structure",
    "unregister_dialect",
]
