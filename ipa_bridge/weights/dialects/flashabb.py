"""FlashABB (the PyPI package `flash-abb`): OpenFold 1's attention without a pair, with a rotary embedding.

Its logits are scaled as with a pair. Unless it is made with use_spectra=False, it also reads how much each head attends
to residues at each distance along the chain, modulo 128. That is the average of a pair representation whose 128
channels are 0 or 1: the pair of residues i and j is 1 at channel (index of j − index of i) mod 128.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ipa_bridge.config import Config, IPAConfig
from ipa_bridge.parameters import Shapes
from ipa_bridge.weights.dialects.spec import Dialect, Form, Order, Row, packed

SPECTRUM = 128
"""Width of the pair representation that stands for distances along the chain."""

ATTENTION = (
    Row("trainable_point_weights", "head_weights"),
    Row("q_scalar", "linear_q"),
    Row("kv_scalar", "linear_kv"),
    *packed(("q_point_local", "kv_point_local"), "linear_points", Order("c h q|c h w", "c h q+c h w")),
    Row("rotary_frequencies", "rotary_emb.freqs"),
    Row("output_projection", "linear_out"),
)


def point_widths(shapes: Shapes) -> Mapping[str, tuple[int, ...]]:
    """Numbers of outputs of `linear_points` for query points, and for key and value points.

    `linear_out` gives the number of value points: it reads H (C + 4 Pv) features, and 128 H more with a spectrum. With
    more than 32 value points or more than 16 query points, both readings may fit. A spectrum is assumed then, since the
    published class has 8 value points.

    Raises:
        ValueError: the widths do not fit each other.
    """
    names = ("linear_points.weight", "linear_q.weight", "linear_out.weight", "head_weights")
    if not all(len(shapes.get(name, ())) == 1 + name.endswith("weight") for name in names):
        return {}  # missing or misshapen parameters raise later
    outputs, scalars, features, heads = (shapes[name][axis] for name, axis in zip(names, (0, 0, 1, 0), strict=True))
    for spectrum in (SPECTRUM, 0):
        rest = features - scalars - heads * spectrum
        if heads < 1 or rest < 4 * heads or rest % (4 * heads):
            continue
        num_point_v = rest // (4 * heads)
        queries, odd = divmod(outputs - 3 * heads * num_point_v, 2)
        if queries > 0 and not odd:
            return {"linear_points": (queries, outputs - queries)}
    raise ValueError(
        f"linear_points.weight {shapes[names[0]]} does not fit linear_out.weight {shapes[names[2]]}, linear_q.weight "
        f"{shapes[names[1]]} and {heads} heads: it must have 3 H (2 P + Pv) outputs, and linear_out.weight must have "
        f"H (C + 4 Pv) inputs, or {SPECTRUM} H more"
    )


def _finish(config: Config) -> Config:
    """Sets what names and shapes do not show."""
    return (
        replace(config, logit_terms=3, norm_epsilon=1e-7, frame_unit=1.0) if isinstance(config, IPAConfig) else config
    )


def _misfits(config: IPAConfig) -> list[str]:
    if config.pair_channel in (None, SPECTRUM):
        return []
    return [
        f"its attention has no pair representation but distances along the chain: pair_channel must be {SPECTRUM}, or "
        f"None for use_spectra=False, not {config.pair_channel}"
    ]


FLASHABB = Dialect(
    name="flashabb",
    title="FlashABB",
    rows={IPAConfig: {"monomer": ATTENTION}},
    forms={
        "monomer": Form(
            scalar_bias=True,
            point_bias=True,
            norm_form="add",
            norm_epsilon=1e-8,
            one_width=True,
            pair_required=False,
            logit_terms=3,
            others={"rotary_embedding": True, "pair_bias": False},
        ),
    },
    landmarks={IPAConfig: ("head_weights", "linear_points.weight", "rotary_emb.freqs")},
    finish=_finish,
    misfits=_misfits,
    varies=("norm_epsilon", "frame_unit"),
    frames=(
        "FlashABB takes residue indices and no pair representation: for its weights, pass as pair the one-hot "
        f"(index of j − index of i) mod {SPECTRUM}; and pass its mask as key_mask"
    ),
    part_widths=point_widths,
)
