"""BioEmu and Distributional Graphormer (DiG): one class, `SAAttention`, at `st_module.encoder.layers.{i}.attn.`.

Logits read distances and not their squares, and each head has its own values of the pair. The output projection alone
has a bias. The layout is the multimer's, with coordinates of points innermost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

from ipa_bridge.config import Config, IPAConfig
from ipa_bridge.weights.dialects.lucidrains import POINTS
from ipa_bridge.weights.dialects.spec import Dialect, Form, Order, Row

FEATURES = Order(ours="h s|c h p|h p|h z", theirs="h s|h p c|h z|h p")
"""Input features of the output projection: scalars, points, the pair, the points' lengths."""

LONG = {"q": "query", "k": "key", "v": "value"}

ATTENTION = (
    Row("trainable_point_weights", "trained_point_weight"),
    *(Row(f"{x}_scalar_projection", f"scalar_{name}") for x, name in LONG.items()),
    *(Row(f"{x}_point_projection/point_projection", f"point_{LONG[x]}", outputs=POINTS[x]) for x in LONG),
    Row("attention_2d", "pair_bias"),
    Row("pair_value", "pair_value"),
    Row("output_projection", "fc_out", inputs=FEATURES),
)


def _finish(config: Config) -> Config:
    """Sets the forms that names and shapes do not show."""
    return replace(
        cast(IPAConfig, config), distance_form="unsquared", norm_form="add", norm_epsilon=0.0, frame_unit=10.0
    )


def _misfits(config: IPAConfig) -> Iterator[str]:
    """Reasons why the class cannot be constructed with these widths."""
    width = config.num_scalar_qk
    if config.pair_value_channel != width:
        yield (
            f"its values of the pair are as wide as its scalar queries: pair_value_channel must be {width}, not "
            f"{config.pair_value_channel}"
        )
    if config.num_head * width != config.num_channel:
        yield (
            f"its heads share the single representation's channels: num_head × num_scalar_qk must be num_channel; here "
            f"it is {config.num_head} × {width}, and num_channel is {config.num_channel}"
        )
    if (config.num_point_qk, config.num_point_v) != (4, 8):
        yield f"it has 4 query and 8 value points per head, not {config.num_point_qk} and {config.num_point_v}"


BIOEMU = Dialect(
    name="bioemu",
    title="BioEmu",
    rows={IPAConfig: {"multimer": ATTENTION}},
    forms={
        "multimer": Form(
            scalar_bias=False,
            point_bias=False,
            norm_form="add",
            norm_epsilon=0.0,
            epsilon_is_fixed=True,
            one_width=True,
            others={"distance_form": "unsquared", "attention_2d_bias": False, "pair_value_per_head": True},
        ),
    },
    landmarks={IPAConfig: ("trained_point_weight", "pair_value.weight", "fc_out.weight")},
    finish=_finish,
    shared={IPAConfig: ("frame_unit",)},  # DiG's is Å
    misfits=_misfits,
    frames=(
        "BioEmu takes frames as (translations, transposed rotations), in nm (DiG: Å), and the mask as a bias on keys, "
        "0 or -inf"
    ),
)
