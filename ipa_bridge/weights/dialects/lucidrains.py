"""The PyPI package `invariant-point-attention`: the multimer layout, but with coordinates of points innermost.

IgFold's layers have the package's names and compute the same, in modules of their own.
"""

from __future__ import annotations

import re
from dataclasses import replace

from ipa_bridge.config import Config, IPABlockConfig, IPAConfig, IPATransformerConfig
from ipa_bridge.weights.dialects.spec import Dialect, Form, Order, Row, within

POINTS = {
    "q": Order(ours="h c q", theirs="h q c"),
    "k": Order(ours="h c q", theirs="h q c"),
    "v": Order(ours="h c p", theirs="h p c"),
}
FEATURES = Order(ours="h s|c h p|h p|h z", theirs="h s|h p c|h p|h z")
"""Input features of the output projection: scalars, points, their lengths, the pair."""

ATTENTION = (
    Row("trainable_point_weights", "point_weights"),
    *(Row(f"{x}_scalar_projection", f"to_scalar_{x}") for x in "qkv"),
    *(Row(f"{x}_point_projection/point_projection", f"to_point_{x}", outputs=order) for x, order in POINTS.items()),
    Row("attention_2d", "to_pairwise_attn_bias.0"),
    Row("output_projection", "to_out", inputs=FEATURES),
)
BLOCK = (
    *within("invariant_point_attention/", "attn.", ATTENTION),
    Row("attention_layer_norm", "attn_norm"),
    Row("transition{}", "ff.{2}"),
    Row("transition_layer_norm", "ff_norm"),
)
LAYERS = (
    *within("ipa_block{}/", "layers.{0}.0.", BLOCK),
    Row("affine_update{}", "layers.{0}.1"),
)
TRANSFORMER = (
    *LAYERS,
    Row("token_embedding", "token_emb"),
    Row("predicted_points", "to_points"),
)


def _finish(config: Config) -> Config:
    """Sets the package's order of composition, which names and shapes do not show."""
    return replace(config, original_composition_order=True) if isinstance(config, IPATransformerConfig) else config


def _finish_igfold(config: Config) -> Config:
    """IgFold's transformer also lets gradients pass through the rotations."""
    config = _finish(config)
    return replace(config, detach_rotations=False) if isinstance(config, IPATransformerConfig) else config


def _lies_in_igfold(root: str) -> bool:
    """Returns True for a path that only IgFold has."""
    return re.search(r"(^|\.)(template|structure|dev)_ipa(\.|$)", root) is not None


LUCIDRAINS = Dialect(
    name="lucidrains",
    title="invariant-point-attention",
    rows={
        IPAConfig: {"multimer": ATTENTION},
        IPABlockConfig: {"multimer": BLOCK},
        IPATransformerConfig: {"multimer": TRANSFORMER},
    },
    forms={
        "multimer": Form(scalar_bias=False, point_bias=False, norm_form="add", norm_epsilon=1e-8, pair_required=False),
    },
    landmarks={
        IPATransformerConfig: ("layers.0.0.attn.point_weights", "layers.0.1.weight"),
        IPABlockConfig: ("attn.point_weights", "attn_norm.weight", "ff.0.weight"),
        IPAConfig: ("point_weights", "to_scalar_q.weight", "to_out.weight"),
    },
    at=lambda root, kind: not _lies_in_igfold(root),
    finish=_finish,
    varies=("norm_epsilon", "post_norm", "detach_rotations", "attention_dropout", "transition_dropout"),
    frames=(
        "invariant-point-attention takes row-vector frames: its `rotations` are the transpose of ours; masked residues "
        "attend to all residues uniformly"
    ),
)

IGFOLD = replace(
    LUCIDRAINS,
    name="igfold",
    title="IgFold",
    rows={
        IPAConfig: {"multimer": ATTENTION},
        IPABlockConfig: {"multimer": BLOCK},
        IPATransformerConfig: {"multimer": LAYERS},
    },
    at=lambda root, kind: _lies_in_igfold(root),
    finish=_finish_igfold,
    varies=(),
    frames=(
        "IgFold takes row-vector frames: its `rotations` are the transpose of ours; masked residues attend uniformly "
        "to all residues that are no padding"
    ),
    detach_argument=("stop_rotation_grad", False),
)
