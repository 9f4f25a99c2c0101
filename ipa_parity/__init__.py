"""Roof of IPA Twins: both frameworks on the same weights and frames, compared in units of machine epsilon."""

from ipa_bridge.version import __version__

__all__ = ["__version__"]
