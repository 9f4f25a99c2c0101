"""Ground floor of IPA Twins: configurations, weights, structures and a float64 oracle; numpy only at import."""

from ipa_bridge.config import IPAConfig
from ipa_bridge.structures import Structure, load_structure
from ipa_bridge.weights import Weights

__all__ = ["IPAConfig", "Structure", "Weights", "load_structure"]
