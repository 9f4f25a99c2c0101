"""The only list of parameters: a config gives their canonical names and shapes, and these give the config.

A canonical name is AlphaFold's haiku name below the module, `module/…/leaf`; the shape is haiku's too:
inputs first, then outputs, heads unflattened in the multimer layout.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping
from typing import Any

from ipa_bridge.config import (
    IPABlockConfig,
    IPAConfig,
    IPATransformerConfig,
    PredictedLDDTConfig,
    StructureModuleConfig,
)

Shapes = dict[str, tuple[int, ...]]

POINT_WEIGHTS = "trainable_point_weights"
"""γ, one per head: the parameter that every attention has."""

ROTARY_FREQUENCIES = "rotary_frequencies"
"""Radians per residue of each pair of channels, where there is a rotary embedding."""


def ipa_parameters(config: IPAConfig) -> Shapes:
    """Canonical parameter names and shapes of one invariant point attention (Suppl. Alg. 22)."""
    shapes: Shapes = {POINT_WEIGHTS: (config.num_head,)}
    project = _monomer_projections if config.layout == "monomer" else _multimer_projections
    shapes |= project(config)
    if config.rotary_embedding:
        shapes[ROTARY_FREQUENCIES] = (config.num_scalar_qk // 2,)
    if config.pair_channel is not None:
        if config.pair_bias:
            shapes |= _linear("attention_2d", config.pair_channel, (config.num_head,), config.attention_2d_bias)
        if config.pair_value_channel is not None and config.pair_value_per_head:
            values = (config.num_head, config.pair_value_channel)
            shapes |= _linear("pair_value", config.pair_channel, values, bias=False)
        elif config.pair_value_channel is not None:
            shapes |= _linear("down_z", config.pair_channel, (config.pair_value_channel,), bias=True)
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


def structure_module_parameters(config: StructureModuleConfig) -> Shapes:
    """Canonical parameter names and shapes of one structure module (Suppl. Alg. 20), including its attention's."""
    single, pair = config.input_channels
    shapes = _layer_norm("single_layer_norm", single) if config.input_norm else {}
    shapes |= _linear("initial_projection", single, (config.num_channel,), bias=True)
    shapes |= _layer_norm("pair_layer_norm", pair) if config.input_norm else {}
    if config.pair_input_channel is not None:
        shapes |= _linear("pair_projection", pair, (config.embedded_pair_channel,), bias=True)
    for layer in range(1 if config.tied_layers else config.num_layer):
        shapes |= {f"{haiku_name('fold_iteration', layer)}/{name}": x for name, x in _fold_iteration(config).items()}
    return shapes


def predicted_lddt_parameters(config: PredictedLDDTConfig) -> Shapes:
    """Canonical parameter names and shapes of the confidence head (Suppl. Alg. 29)."""
    return {
        **_layer_norm("input_layer_norm", config.num_channel),
        **_linear("act_0", config.num_channel, (config.hidden_channel,), bias=True),
        **_linear("act_1", config.hidden_channel, (config.hidden_channel,), bias=True),
        **_linear("logits", config.hidden_channel, (config.num_bin,), bias=True),
    }


def ipa_block_parameters(config: IPABlockConfig) -> Shapes:
    """Canonical parameter names and shapes of an IPA block: an attention and its transition."""
    c_s, layers = config.num_channel, config.num_layer_in_transition
    shapes = {f"invariant_point_attention/{name}": x for name, x in ipa_parameters(config.ipa).items()}
    shapes |= _layer_norm("attention_layer_norm", c_s)
    shapes |= _transition(c_s, layers, config.transition_factor)
    return shapes | _layer_norm("transition_layer_norm", c_s)


def ipa_transformer_parameters(config: IPATransformerConfig) -> Shapes:
    """Canonical parameter names and shapes of an IPA transformer, whose blocks have their own weights."""
    c_s = config.num_channel
    shapes: Shapes = {} if config.num_token is None else {"token_embedding/embeddings": (config.num_token, c_s)}
    for i in range(config.num_layer):
        block = ipa_block_parameters(config.block)
        shapes |= {f"{haiku_name('ipa_block', i)}/{name}": x for name, x in block.items()}
        shapes |= _linear(haiku_name("affine_update", i), c_s, (6,), bias=True)
    return shapes | (_linear("predicted_points", c_s, (3,), bias=True) if config.predict_points else {})


def haiku_name(name: str, index: int) -> str:
    """Haiku's name of module number `index`, counted from 0, among modules of the same name."""
    return f"{name}_{index}" if index else name


_TORCH_LEAVES = {"weights": "weight", "scale": "weight", "offset": "bias", "embeddings": "weight"}


def torch_name(name: str) -> str:
    """The torch parameter of a canonical name: `/` → `.`; weights, scale, embeddings → weight; offset → bias."""
    *modules, leaf = name.split("/")
    return ".".join([*modules, _TORCH_LEAVES.get(leaf, leaf)])


def canonical_leaf(module: str, leaf: str) -> str:
    """The canonical leaf of a torch parameter in a module; inverts `torch_name` for the leaf."""
    if module.endswith("layer_norm"):
        return {"weight": "scale", "bias": "offset"}.get(leaf, leaf)
    if module.endswith("embedding"):
        return {"weight": "embeddings"}.get(leaf, leaf)
    return "weights" if leaf == "weight" else leaf


def _fold_iteration(config: StructureModuleConfig) -> Shapes:
    c_s, width = config.num_channel, config.sidechain_channel
    update = "affine_update" if config.ipa.layout == "monomer" else "quat_rigid/rigid"
    shapes = {f"invariant_point_attention/{name}": x for name, x in ipa_parameters(config.ipa).items()}
    shapes |= _layer_norm("attention_layer_norm", c_s)
    shapes |= _transition(c_s, config.num_layer_in_transition, config.transition_factor)
    shapes |= _layer_norm("transition_layer_norm", c_s) | _linear(update, c_s, (6,), bias=True)
    if config.sidechain_input == "summed":
        for i, inputs in enumerate((c_s, config.initial_act_channel)):
            shapes |= _linear(f"rigid_sidechain/{haiku_name('input_projection', i)}", inputs, (width,), bias=True)
    first = 3 - config.num_layer_in_residual_block  # the third layer, resblock0, precedes AlphaFold's two
    for i in range(config.num_residual_block):
        for k in range(first, 3):
            shapes |= _linear(f"rigid_sidechain/{haiku_name(f'resblock{k}', i)}", width, (width,), bias=True)
    return shapes | _linear("rigid_sidechain/unnormalized_angles", width, (14,), bias=True)


def _transition(c_s: int, layers: int, factor: int) -> Shapes:
    shapes: Shapes = {}
    for i in range(layers):
        inputs, outputs = (c_s if end else c_s * factor for end in (i == 0, i == layers - 1))
        shapes |= _linear(haiku_name("transition", i), inputs, (outputs,), bias=True)
    return shapes


def _layer_norm(name: str, width: int) -> Shapes:
    return {f"{name}/scale": (width,), f"{name}/offset": (width,)}


def _linear(name: str, inputs: int, outputs: tuple[int, ...], bias: bool) -> Shapes:
    weights = {f"{name}/weights": (inputs, *outputs)}
    return {**weights, f"{name}/bias": outputs} if bias else weights


def infer_structure_module(shapes: Mapping[str, tuple[int, ...]]) -> StructureModuleConfig:
    """Infers a structure module's config from canonical names and shapes.

    They do not show how many layers share weights; eight is assumed, as in AlphaFold and ESMFold. They do not show the
    unit of the frames and some other forms either; AlphaFold's are assumed.

    Raises:
        ValueError: parameters of the attention are missing or empty, or sizes do not divide by the number of heads.
    """
    fold = "fold_iteration/"
    within = {name.removeprefix(fold): shape for name, shape in shapes.items() if name.startswith(fold)}
    attention = "invariant_point_attention/"
    ipa = infer_ipa({n.removeprefix(attention): x for n, x in within.items() if n.startswith(attention)})
    multimer = ipa.layout == "multimer"
    preset = StructureModuleConfig.alphafold_multimer() if multimer else StructureModuleConfig.alphafold2()
    layers = _count("fold_iteration", "/attention_layer_norm/scale", shapes)
    inputs = shapes.get("initial_projection/weights", (ipa.num_channel,))[0]
    return dataclasses.replace(
        preset,
        ipa=dataclasses.replace(ipa, position_scale=1.0, frame_unit=preset.position_scale),
        num_layer=layers if layers > 1 else preset.num_layer,
        tied_layers=layers < 2,
        num_layer_in_transition=max(1, _count("transition", "/weights", within)),
        transition_factor=_transition_factor(within, ipa.num_channel),
        **_infer_inputs(shapes, ipa),
        **_infer_side_chains(within, ipa.num_channel, inputs, preset),
    )


def _transition_factor(shapes: Mapping[str, tuple[int, ...]], c_s: int) -> int:
    return max(1, math.prod(shapes.get("transition/bias", (c_s,))) // c_s)


def _infer_inputs(shapes: Mapping[str, tuple[int, ...]], ipa: IPAConfig) -> dict[str, Any]:
    """The config's fields about the two representations that the caller passes."""
    projected = shapes.get("pair_projection/weights")
    embedded = projected[1:] if projected else shapes.get("pair_layer_norm/scale", (ipa.pair_channel,))
    return {
        "pair_input_channel": projected[0] if projected else None,
        "input_norm": any(name.startswith(("single_layer_norm/", "pair_layer_norm/")) for name in shapes),
        "distance_channel": ipa.pair_channel != 1 and embedded == ((ipa.pair_channel or 0) - 1,),
    }


def _infer_side_chains(
    within: Mapping[str, tuple[int, ...]], c_s: int, inputs: int, default: StructureModuleConfig
) -> dict[str, Any]:
    """The config's fields about the side chains, from names and shapes in one layer and the width of the input."""
    summed = any(name.startswith("rigid_sidechain/input_projection") for name in within)
    first = "input_projection" if summed else "resblock1"
    width = math.prod(within.get(f"rigid_sidechain/{first}/bias", (default.sidechain_channel,)))
    initial = within.get("rigid_sidechain/input_projection_1/weights", (inputs,))[0] if summed else width - c_s
    concatenated = not summed and initial in (c_s, inputs)
    return {
        "single_input_channel": inputs,
        "project_initial_act": initial == c_s != inputs,
        "sidechain_channel": width,
        "sidechain_input": "concatenated" if concatenated else "summed",
        "num_layer_in_residual_block": 3 if "rigid_sidechain/resblock0/weights" in within else 2,
        "num_residual_block": max(1, _count("rigid_sidechain/resblock1", "/weights", within)),
    }


def infer_ipa_block(shapes: Mapping[str, tuple[int, ...]]) -> IPABlockConfig:
    """Infers an IPA block's config from canonical names and shapes.

    Raises:
        ValueError: parameters of the attention are missing or empty, or sizes do not divide by the number of heads.
    """
    attention = "invariant_point_attention/"
    ipa = infer_ipa({n.removeprefix(attention): x for n, x in shapes.items() if n.startswith(attention)})
    return IPABlockConfig(
        ipa=ipa,
        num_layer_in_transition=max(1, _count("transition", "/weights", shapes)),
        transition_factor=_transition_factor(shapes, ipa.num_channel),
    )


def infer_ipa_transformer(shapes: Mapping[str, tuple[int, ...]]) -> IPATransformerConfig:
    """Infers an IPA transformer's config from canonical names and shapes; only the first block is looked at.

    Raises:
        ValueError: parameters of the attention are missing or empty, or sizes do not divide by the number of heads.
    """
    first = {n.removeprefix("ipa_block/"): x for n, x in shapes.items() if n.startswith("ipa_block/")}
    return IPATransformerConfig(
        block=infer_ipa_block(first),
        num_layer=_count("ipa_block", "/transition_layer_norm/scale", shapes),
        num_token=shapes["token_embedding/embeddings"][0] if "token_embedding/embeddings" in shapes else None,
        predict_points="predicted_points/weights" in shapes,
    )


def infer_predicted_lddt(shapes: Mapping[str, tuple[int, ...]]) -> PredictedLDDTConfig:
    """Infers a confidence head's config from canonical names and shapes.

    Raises:
        ValueError: parameters are missing.
    """
    missing = [name for name in ("act_0/bias", "input_layer_norm/scale", "logits/bias") if name not in shapes]
    if missing:
        raise ValueError(f"a confidence head must have {', '.join(missing)}; got {', '.join(sorted(shapes))}")
    num_channel, hidden_channel, num_bin = (
        math.prod(shapes[name]) for name in ("input_layer_norm/scale", "act_0/bias", "logits/bias")
    )
    return PredictedLDDTConfig(num_channel=num_channel, hidden_channel=hidden_channel, num_bin=num_bin)


def _count(module: str, leaf: str, names: Collection[str]) -> int:
    """Number of modules of that name, as haiku numbers them."""
    return next(i for i in itertools.count() if f"{haiku_name(module, i)}{leaf}" not in names)


def infer_ipa(shapes: Mapping[str, tuple[int, ...]]) -> IPAConfig:
    """Infers an attention's config from canonical names and shapes; heads may be flattened or not.

    Fields that they do not determine are taken from the system with such parameters: FrameDiff if there is a `down_z`;
    else AlphaFold 2 for the monomer layout; for the multimer layout, AlphaFold-Multimer if points have biases and
    `invariant-point-attention` if not.

    Raises:
        ValueError: parameters are missing or empty, or sizes do not divide by the number of heads.
    """
    multimer = any(name.startswith("q_scalar_projection/") for name in shapes)
    scalars = ("q_scalar_projection", "v_scalar_projection") if multimer else ("q_scalar", "kv_scalar")
    points = ("q_point_projection/point_projection", "v_point_projection/point_projection")
    points = points if multimer else ("q_point_local", "kv_point_local")
    needed = [POINT_WEIGHTS, *(f"{name}/weights" for name in (*scalars, *points, "output_projection"))]
    missing = [name for name in needed if name not in shapes]
    if missing:
        got = ", ".join(sorted(shapes))
        raise ValueError(f"an invariant point attention must have {', '.join(missing)}; got {got}")
    of_pair = [f"{name}/weights" for name in ("attention_2d", "pair_value", "down_z")]
    sized = [name for name in (*needed, *of_pair) if name in shapes]
    formless = [name for name in sized if 0 in shapes[name] or len(shapes[name]) < 1 + name.endswith("/weights")]
    if formless:
        listed = ", ".join(f"{name} {shapes[name]}" for name in formless)
        raise ValueError(f"these parameters are empty, or have too few axes: {listed}")
    heads = math.prod(shapes[POINT_WEIGHTS])

    def per_head(module: str, per: int = 1) -> int:
        outputs = math.prod(shapes[f"{module}/weights"][1:])
        if outputs % (heads * per):
            raise ValueError(
                f"{module}/weights has {outputs} outputs, which {heads} heads"
                + (f" of {per} coordinates" if per > 1 else "")
                + f" do not divide: {POINT_WEIGHTS} or {module}/weights has a wrong shape"
            )
        return outputs // (heads * per)

    qk, v = (per_head(name) for name in scalars)
    p_qk, p_v = (per_head(name, 3) for name in points)
    v, p_v = (v, p_v) if multimer else (v - qk, p_v - p_qk)
    point_bias = f"{points[0]}/bias" in shapes
    preset = IPAConfig.alphafold2()
    if multimer:
        preset = IPAConfig.alphafold_multimer() if point_bias else IPAConfig.lucidrains(1)
    if "down_z/weights" in shapes:
        preset = IPAConfig.framediff()
    return dataclasses.replace(
        preset,
        layout="multimer" if multimer else "monomer",
        num_channel=shapes[f"{scalars[0]}/weights"][0],
        num_head=heads,
        num_scalar_qk=qk,
        num_scalar_v=v,
        num_point_qk=p_qk,
        num_point_v=p_v,
        scalar_bias=f"{scalars[0]}/bias" in shapes,
        point_bias=point_bias,
        rotary_embedding=ROTARY_FREQUENCIES in shapes,
        **_infer_pair(shapes, per_head("pair_value") if "pair_value/weights" in shapes else None, heads, v, p_v),
    )


def _infer_pair(
    shapes: Mapping[str, tuple[int, ...]], per_head: int | None, heads: int, scalars: int, points: int
) -> dict[str, Any]:
    """The config's fields about the pair, from the widths of a head's own pair values, scalar and point values."""
    of_pair = [f"{name}/weights" for name in ("attention_2d", "pair_value", "down_z")]
    pair_channel: int | None = next((shapes[name][0] for name in of_pair if name in shapes), None)
    attended = shapes["output_projection/weights"][0] // heads - scalars - 4 * points
    if pair_channel is None and attended > 0:  # attended to as it is, without a bias
        pair_channel = attended
    shared = math.prod(shapes["down_z/weights"][1:]) if "down_z/weights" in shapes else None
    return {
        "pair_channel": pair_channel,
        "pair_bias": pair_channel is None or "attention_2d/weights" in shapes,
        "attention_2d_bias": "attention_2d/weights" not in shapes or "attention_2d/bias" in shapes,
        "pair_value_channel": shared if per_head is None else per_head,
        "pair_value_per_head": per_head is not None,
    }
