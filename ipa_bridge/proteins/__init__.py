"""Proteins: tables of amino acids, and structures read from and written to PDB and mmCIF files."""

from ipa_bridge.proteins.reading import load_structure
from ipa_bridge.proteins.structure import Structure
from ipa_bridge.proteins.writing import save_structure

__all__ = ["Structure", "load_structure", "save_structure"]
