"""The one list of every weight: a config gives the canonical names and shapes of its parameters.

A canonical name is AlphaFold's haiku name below the module, `module/…/leaf`; the shape is haiku's too:
inputs first, then outputs, heads unflattened in the multimer layout.
"""

from __future__ import annotations

from ipa_bridge.config import IPAConfig

Shapes = dict[str, tuple[int, ...]]


def ipa_parameters(config: IPAConfig) -> Shapes:
    """Canonical parameter names and shapes of one invariant point attention (Suppl. Alg. 22)."""
    shapes: Shapes = {"trainable_point_weights": (config.num_head,)}
    project = _monomer_projections if config.layout == "monomer" else _multimer_projections
    shapes |= project(config)
    if config.pair_channel is not None:
        shapes |= _linear("attention_2d", config.pair_channel, (config.num_head,), bias=True)
    shapes |= _linear("output_projection", config.num_feature, (config.num_channel,), bias=True)
    return shapes


def _monomer_projections(config: IPAConfig) -> Shapes:
    c_s, h = config.num_channel, config.num_head
    qk, v = config.num_scalar_qk, config.num_scalar_v
    p, pv = config.num_point_qk, config.num_point_v
    return {
        **_linear("q_scalar", c_s, (h * qk,), config.scalar_bias),
        **_linear("kv_scalar", c_s, (h * (qk + v),), config.scalar_bias),
        **_linear("q_point_local", c_s, (3 * h * p,), config.point_bias),
        **_linear("kv_point_local", c_s, (3 * h * (p + pv),), config.point_bias),
    }


def _multimer_projections(config: IPAConfig) -> Shapes:
    c_s, h = config.num_channel, config.num_head
    shapes: Shapes = {}
    scalars = {"q": config.num_scalar_qk, "k": config.num_scalar_qk, "v": config.num_scalar_v}
    points = {"q": config.num_point_qk, "k": config.num_point_qk, "v": config.num_point_v}
    for letter, width in scalars.items():
        shapes |= _linear(f"{letter}_scalar_projection", c_s, (h, width), config.scalar_bias)
    for letter, number in points.items():
        shapes |= _linear(f"{letter}_point_projection/point_projection", c_s, (h, 3 * number), config.point_bias)
    return shapes


def _linear(name: str, inputs: int, outputs: tuple[int, ...], bias: bool) -> Shapes:
    weights = {f"{name}/weights": (inputs, *outputs)}
    return {**weights, f"{name}/bias": outputs} if bias else weights
