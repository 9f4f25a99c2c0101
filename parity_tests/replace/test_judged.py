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


@pytest.mark.parametrize("which", stand_ins.STAND_INS)
def test_swapped_layers_of_openfold_and_its_kin(which):
    layer = stand_ins.stand_in(which, "float64")[0]
    assert_right(layer, True, layer.function)


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


def assert_right(layer, swapped, config=None, *, gradients=True):
    torch.nn.init.normal_(next(x for name, x in layer.named_parameters() if "out" in name or "final" in name))
    if swapped:
        model = nn.ModuleList([layer])
        ipa_torch.replace_ipa(model)
        layer = model[0]
    report = check(layer, config, dtypes=("float32",), gradients=gradients)
    assert report.passed, str(report)
