"""Uni-Fold's multimer attention: OpenFold 2's multimer names without `.linear`. Its monomer has OpenFold 1's names."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from ipa_bridge.config import Config, IPAConfig
from ipa_bridge.weights.dialects.openfold import MULTIMER
from ipa_bridge.weights.dialects.spec import Dialect, Form


def _finish(config: Config) -> Config:
    """Sets the norm form, which differs from that of AlphaFold's multimer."""
    return replace(cast(IPAConfig, config), norm_form="add")


UNIFOLD = Dialect(
    name="unifold",
    title="Uni-Fold Multimer",
    rows={IPAConfig: {"multimer": tuple(row._replace(theirs=row.theirs.removesuffix(".linear")) for row in MULTIMER)}},
    forms={"multimer": Form(scalar_bias=False, point_bias=True, norm_form="add", norm_epsilon=1e-8, one_width=True)},
    landmarks={IPAConfig: ("head_weights", "linear_q_points.weight", "linear_k_points.weight")},
    finish=_finish,
    absent=("down_z.weight",),
    varies=("norm_epsilon",),  # the class's default is 1e-8; Uni-Fold's own config passes 1e-12
)
