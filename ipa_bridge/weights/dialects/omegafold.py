"""OmegaFold: AlphaFold's attention with separate projections and coordinates of points innermost.

Each of the structure module's layers `structure_module.cycles.{i}.ipa` has its own weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from ipa_bridge.config import Config, IPAConfig
from ipa_bridge.weights.dialects.lucidrains import FEATURES, POINTS
from ipa_bridge.weights.dialects.spec import Dialect, Form, Row

ATTENTION = (
    Row("trainable_point_weights", "trainable_point_weights"),
    *(Row(f"{x}_scalar_projection", f"{x}_scalar") for x in "qkv"),
    *(Row(f"{x}_point_projection/point_projection", f"{x}_point", outputs=order) for x, order in POINTS.items()),
    Row("attention_2d", "bias_2d"),
    Row("output_projection", "output_projection", inputs=FEATURES),
)


def _finish(config: Config) -> Config:
    """Sets the norm, the unit and the initial output, which names and shapes do not show."""
    return replace(cast(IPAConfig, config), norm_form="add", norm_epsilon=0.0, frame_unit=10.0, zero_init=False)


OMEGAFOLD = Dialect(
    name="omegafold",
    title="OmegaFold",
    rows={IPAConfig: {"multimer": ATTENTION}},
    forms={
        "multimer": Form(scalar_bias=True, point_bias=True, norm_form="add", norm_epsilon=0.0, epsilon_is_fixed=True),
    },
    landmarks={IPAConfig: ("trainable_point_weights", "bias_2d.weight", "q_point.weight")},
    finish=_finish,
    frames="OmegaFold's frames are in nm and carry the mask, which hides keys from all residues",
)
