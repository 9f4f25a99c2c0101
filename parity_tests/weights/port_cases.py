"""Runs of ipa-port, and its input files."""

from __future__ import annotations

from dataclasses import replace

from ipa_bridge.config import StructureModuleConfig
from ipa_bridge.weights.cli import main
from ipa_parity.attention.cases import ODD

ONE_WIDTH = replace(ODD, num_scalar_v=ODD.num_scalar_qk)
SMALL_MODULE = StructureModuleConfig(ipa=ONE_WIDTH, sidechain_channel=5)
ALPHAFOLD = "alphafold/alphafold_iteration"


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(x) for x in arguments])
    out, err = capsys.readouterr()
    return code, out, err
