"""The 20 amino acids in AlphaFold's order."""

from __future__ import annotations

RESTYPES = "ARNDCQEGHILKMFPSTWYV"
"""One-letter codes; a residue's aatype is its index here."""

UNKNOWN_AATYPE = len(RESTYPES)
"""aatype of a residue that is none of the 20 (AlphaFold's X)."""
