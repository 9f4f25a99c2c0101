"""lociPARSE: OpenFold 1's names beside a layer's norms and transition, over the k nearest residues."""

from __future__ import annotations

from ipa_bridge.config import IPAConfig
from ipa_bridge.weights.dialects.openfold import MONOMER_V1
from ipa_bridge.weights.dialects.spec import Dialect, Form

LOCIPARSE = Dialect(
    name="lociparse",
    title="lociPARSE",
    rows={IPAConfig: {"monomer": MONOMER_V1}},
    forms={
        "monomer": Form(
            scalar_bias=True,
            point_bias=True,
            norm_form="add",
            norm_epsilon=1e-8,
            epsilon_is_fixed=True,
            one_width=True,
        )
    },
    landmarks={IPAConfig: ("head_weights", "linear_q_points.weight")},
    absent=("down_z.weight",),
    beside=("norm", "node_dense"),
    frames="lociPARSE's attention reads each residue's neighbours alone, as they are listed in `E_idx`",
)
