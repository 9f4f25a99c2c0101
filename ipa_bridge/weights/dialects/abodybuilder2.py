"""ABodyBuilder2, NanoBodyBuilder2 and TCRBuilder2, which share one class (the PyPI package `ImmuneBuilder`).

Each layer of a model has its own weights at `layers.{i}.IPA`. Distances are not squared, point weights are γ itself,
and frames are in Å.
"""

from __future__ import annotations

from dataclasses import replace

from ipa_bridge.config import Config, IPAConfig
from ipa_bridge.weights.dialects.spec import Dialect, Form, Order, Row, packed

FEATURES = Order(ours="h s|c h p|h p|h z", theirs="h z|h s|h p 1+h p c")
"""Input features of the output projection: the pair, scalars, and for each point its length and coordinates."""

SCALARS = Order(ours="h d|h d|h s", theirs="h d|h d|h s")
POINTS = Order(ours="h c q|h c q", theirs="h q c|h q c")

ATTENTION = (
    Row("trainable_point_weights", "point_weight"),
    *packed([f"{x}_scalar_projection" for x in "qkv"], "to_scalar_qkv", SCALARS),
    *packed([f"{x}_point_projection/point_projection" for x in "qk"], "to_vector_qk", POINTS),
    Row("v_point_projection/point_projection", "to_vector_v", outputs=Order(ours="h c p", theirs="h p c")),
    Row("attention_2d", "to_scalar_edge_attention_bias"),
    Row("output_projection", "final_linear", inputs=FEATURES),
)

DISTANCE_EPSILON = 1e-8
"""Added to squared distances between points under the root; no argument of the class sets it."""


def _finish(config: Config) -> Config:
    """Sets what names and shapes do not show."""
    if not isinstance(config, IPAConfig):
        return config
    return replace(
        config,
        distance_form="unsquared",
        distance_epsilon=DISTANCE_EPSILON,
        point_weight_form="identity",
        frame_unit=1.0,
        zero_init=True,
    )


ABODYBUILDER2 = Dialect(
    name="abodybuilder2",
    title="ABodyBuilder2",
    rows={IPAConfig: {"multimer": ATTENTION}},
    forms={
        "multimer": Form(
            scalar_bias=False,
            point_bias=False,
            norm_form="add",
            norm_epsilon=1e-8,
            epsilon_is_fixed=True,
            one_width=True,
            others={
                "distance_form": "unsquared",
                "distance_epsilon": DISTANCE_EPSILON,
                "point_weight_form": "identity",
                "attention_2d_bias": False,
            },
        ),
    },
    landmarks={IPAConfig: ("point_weight", "to_scalar_qkv.weight", "to_vector_qk.weight")},
    finish=_finish,
    frames="ABodyBuilder2's attention adds its input to its output, and takes neither a mask nor a batch axis",
)
