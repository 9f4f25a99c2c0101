"""Proteins: what amino acids are made of, and structures read from PDB and mmCIF files and written to them."""

from ipa_bridge.proteins.reading import load_structure
from ipa_bridge.proteins.structure import Structure
from ipa_bridge.proteins.writing import save_structure

__all__ = ["Structure", "load_structure", "save_structure"]
