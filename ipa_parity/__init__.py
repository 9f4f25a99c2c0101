"""Comparison of both frameworks on the same weights and frames, in units of machine epsilon."""

from ipa_bridge.version import __version__

__all__ = ["__version__"]
