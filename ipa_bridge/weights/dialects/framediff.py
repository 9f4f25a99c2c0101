"""FrameDiff and FrameFlow, and their families: OpenFold 1's names in each block `trunk.ipa_{b}`, and `down_z`.

Frames are in nm. FrameDiff, FoldFlow and Proteus also own a `linear_rbf` that no forward pass reads; FrameFlow,
MultiFlow and FlashIPA do not.
"""

from __future__ import annotations

from dataclasses import replace

from ipa_bridge.config import IPAConfig
from ipa_bridge.weights.dialects.openfold import MONOMER_V1
from ipa_bridge.weights.dialects.spec import Dialect, Form, Row

FRAMEDIFF = Dialect(
    name="framediff",
    title="FrameDiff",
    rows={IPAConfig: {"monomer": (*MONOMER_V1, Row("down_z", "down_z"))}},
    forms={
        "monomer": Form(
            scalar_bias=True, point_bias=True, norm_form="add", norm_epsilon=1e-8, one_width=True, pair_value_divisor=4
        ),
    },
    landmarks={IPAConfig: ("head_weights", "linear_q_points.weight", "down_z.weight")},
    unused={IPAConfig: {"linear_rbf.weight": (1, 20), "linear_rbf.bias": (1,)}},
)

FRAMEFLOW = replace(FRAMEDIFF, name="frameflow", title="FrameFlow", absent=("linear_rbf.weight",), unused={})
