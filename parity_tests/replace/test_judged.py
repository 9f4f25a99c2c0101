"""Layers of other systems, and ours in their place, are judged right by `ipa_parity.check`."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
import stand_ins
import torch
from key_mask_layers import BioEmu, OmegaFold
from packed_stand_ins import ABodyBuilder2
from torch import nn

import ipa_torch
from ipa_bridge.config import IPAConfig
from ipa_parity import check


@pytest.mark.parametrize("which", [x for x in stand_ins.STAND_INS if "other class" not in x])
def test_swapped_layers_of_openfold_and_its_kin(which):
    """All but one whose norm is not its dialect's: our weights with that norm convert to the other layout."""
    layer = stand_ins.stand_in(which, "float64")[0]
    assert_right(layer, True)


OTHERS = {
    "ABodyBuilder2": (ABodyBuilder2, IPAConfig.abodybuilder2()),
    "BioEmu": (BioEmu, IPAConfig.bioemu()),
    "OmegaFold": (OmegaFold, IPAConfig.omegafold()),
}


@pytest.mark.covering
@pytest.mark.parametrize("swapped", [False, True], ids=["itself", "swapped"])
@pytest.mark.parametrize("which", OTHERS)
def test_layers_without_a_batch_or_with_a_call_of_their_own(which, swapped):
    kind, config = OTHERS[which]
    assert_right(kind(config).double(), swapped, gradients=which != "OmegaFold")


def assert_right(layer, swapped, *, gradients=True):
    torch.nn.init.normal_(next(x for name, x in layer.named_parameters() if "out" in name or "final" in name))
    if swapped:
        model = nn.ModuleList([layer])
        ipa_torch.replace_ipa(model)
        layer = model[0]
    config = layer._ipa_twins.config if swapped else None
    report = check(layer, config, dtypes=("float32",), gradients=gradients)
    assert report.passed, str(report)
