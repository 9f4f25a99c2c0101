"""Comparison of both frameworks on the same weights and frames, in units of machine epsilon."""

from ipa_bridge.version import __version__
from ipa_parity.checking import MISTAKES, Diagnosis, Finding, Mistake, Report, check
from ipa_parity.checking.pieces import check_atoms, check_backbone_update, check_fape

__all__ = [
    "MISTAKES",
    "Diagnosis",
    "Finding",
    "Mistake",
    "Report",
    "__version__",
    "check",
    "check_atoms",
    "check_backbone_update",
    "check_fape",
]
