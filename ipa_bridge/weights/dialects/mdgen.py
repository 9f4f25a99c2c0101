"""MDGen's attention without a pair: OpenFold 1's names less the pair bias. Its logits still have the scale √(1/3).

Frames are in Å.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from ipa_bridge.config import Config, IPAConfig
from ipa_bridge.weights.dialects.openfold import MONOMER_V1
from ipa_bridge.weights.dialects.spec import Dialect, Form


def _finish(config: Config) -> Config:
    """Sets the scale of logits and the unit of frames, which names and shapes do not show."""
    return replace(cast(IPAConfig, config), logit_terms=3, frame_unit=1.0)


MDGEN = Dialect(
    name="mdgen",
    title="MDGen",
    rows={IPAConfig: {"monomer": tuple(row for row in MONOMER_V1 if row.ours != "attention_2d")}},
    forms={
        "monomer": Form(
            scalar_bias=True,
            point_bias=True,
            norm_form="add",
            norm_epsilon=1e-8,
            one_width=True,
            pair_required=False,
            logit_terms=3,
        ),
    },
    landmarks={IPAConfig: ("head_weights", "linear_q_points.weight", "linear_kv.weight")},
    absent=("linear_b.weight", "down_z.weight"),
    finish=_finish,
    varies=("norm_epsilon",),
)
