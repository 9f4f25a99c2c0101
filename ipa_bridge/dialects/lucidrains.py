"""The PyPI package `invariant-point-attention`: the multimer's projections, points with the coordinate innermost."""

from __future__ import annotations

from ipa_bridge.config import IPAConfig
from ipa_bridge.dialects.spec import Dialect, Form, Order, Row

POINTS = {
    "q": Order(ours="h c q", theirs="h q c"),
    "k": Order(ours="h c q", theirs="h q c"),
    "v": Order(ours="h c p", theirs="h p c"),
}
FEATURES = Order(ours="h s|c h p|h p|h z", theirs="h s|h p c|h p|h z")
"""What the output projection reads: scalars, points, their lengths, the pair."""

LUCIDRAINS = Dialect(
    name="lucidrains",
    title="invariant-point-attention",
    rows={
        IPAConfig: {
            "multimer": (
                Row("trainable_point_weights", "point_weights"),
                *(Row(f"{x}_scalar_projection", f"to_scalar_{x}") for x in "qkv"),
                *(
                    Row(f"{x}_point_projection/point_projection", f"to_point_{x}", outputs=order)
                    for x, order in POINTS.items()
                ),
                Row("attention_2d", "to_pairwise_attn_bias.0"),
                Row("output_projection", "to_out", inputs=FEATURES),
            )
        }
    },
    forms={
        "multimer": Form(scalar_bias=False, point_bias=False, norm_form="add", norm_epsilon=1e-8, pair_required=False),
    },
    landmarks={IPAConfig: ("point_weights", "to_scalar_q.weight", "to_out.weight")},
    frames=(
        "invariant-point-attention takes row-vector frames: its `rotations` are the transpose of ours; rows of masked "
        "residues attend to all alike"
    ),
)
