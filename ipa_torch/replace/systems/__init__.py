"""Systems whose layers can be replaced. To add one, write a file with its adapter and add a row to `SYSTEMS`."""

from __future__ import annotations

from ipa_torch.replace.systems.abodybuilder2 import ABODYBUILDER2, ABodyBuilder2Adapter
from ipa_torch.replace.systems.bioemu import BIOEMU, BioEmuAdapter
from ipa_torch.replace.systems.flashabb import FLASHABB, FlashABBAdapter
from ipa_torch.replace.systems.lociparse import LOCIPARSE, LociParseAdapter
from ipa_torch.replace.systems.lucidrains import LUCIDRAINS, LucidrainsAdapter
from ipa_torch.replace.systems.omegafold import OMEGAFOLD, OmegaFoldAdapter
from ipa_torch.replace.systems.openfold import OPENFOLD_SYSTEMS, OpenFoldAdapter
from ipa_torch.replace.systems.system import System
from ipa_torch.replace.systems.table import CALLS, Call, TableAdapter, forget_tables, system_of

__all__ = [
    "CALLS",
    "SYSTEMS",
    "ABodyBuilder2Adapter",
    "BioEmuAdapter",
    "Call",
    "FlashABBAdapter",
    "LociParseAdapter",
    "LucidrainsAdapter",
    "OmegaFoldAdapter",
    "OpenFoldAdapter",
    "System",
    "TableAdapter",
    "forget_tables",
    "system_of",
]

SYSTEMS: dict[str, System] = {
    **OPENFOLD_SYSTEMS,
    "lucidrains": LUCIDRAINS,
    "abodybuilder2": ABODYBUILDER2,
    "bioemu": BIOEMU,
    "flashabb": FLASHABB,
    "igfold": LUCIDRAINS,
    "lociparse": LOCIPARSE,
    "omegafold": OMEGAFOLD,
}
"""Systems whose layers can be replaced, by dialect. Layers whose forward takes other arguments are left alone.

Parameters without effect are listed in the dialect.
"""
