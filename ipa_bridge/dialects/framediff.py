"""FrameDiff, FrameFlow and FoldFlow: OpenFold 1's names in each block `trunk.ipa_{b}`, and `down_z`; frames in nm."""

from __future__ import annotations

from ipa_bridge.config import IPAConfig
from ipa_bridge.dialects.openfold import MONOMER_V1
from ipa_bridge.dialects.spec import Dialect, Form, Row

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
)
