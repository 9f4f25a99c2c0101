"""Systems whose layers can be replaced. To add one, write a file with its adapter and add a row to `SYSTEMS`."""

from __future__ import annotations

from ipa_torch.replace.systems.abodybuilder2 import ABODYBUILDER2, ABodyBuilder2Adapter
from ipa_torch.replace.systems.bioemu import BIOEMU, BioEmuAdapter
from ipa_torch.replace.systems.flashabb import FLASHABB, FlashABBAdapter
from ipa_torch.replace.systems.lucidrains import LUCIDRAINS, LucidrainsAdapter
from ipa_torch.replace.systems.omegafold import OMEGAFOLD, OmegaFoldAdapter
from ipa_torch.replace.systems.openfold import OPENFOLD_SYSTEMS, OpenFoldAdapter
from ipa_torch.replace.systems.system import System

__all__ = [
    "SYSTEMS",
    "ABodyBuilder2Adapter",
    "BioEmuAdapter",
    "FlashABBAdapter",
    "LucidrainsAdapter",
    "OmegaFoldAdapter",
    "OpenFoldAdapter",
    "System",
]

SYSTEMS: dict[str, System] = {
    **OPENFOLD_SYSTEMS,
    "lucidrains": LUCIDRAINS,
    "abodybuilder2": ABODYBUILDER2,
    "flashabb": FLASHABB,
    "bioemu": BIOEMU,
    "omegafold": OMEGAFOLD,
}
"""Systems whose layers can be replaced, by dialect. Layers whose forward takes other arguments are left alone.

Parameters without effect are listed in the dialect.
"""
