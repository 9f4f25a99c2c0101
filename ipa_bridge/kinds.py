"""Kinds of module that weights may belong to, one row for each.

A row gives a kind's config type, its parameters, the names that identify it, and the config fields that names and
shapes of parameters determine. To add a head or module, add a config and a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

from ipa_bridge.config import (
    Config,
    IPABlockConfig,
    IPAConfig,
    IPATransformerConfig,
    PredictedLDDTConfig,
    StructureModuleConfig,
)
from ipa_bridge.parameters import (
    POINT_WEIGHTS,
    Shapes,
    infer_ipa,
    infer_ipa_block,
    infer_ipa_transformer,
    infer_predicted_lddt,
    infer_structure_module,
    ipa_block_parameters,
    ipa_parameters,
    ipa_transformer_parameters,
    predicted_lddt_parameters,
    structure_module_parameters,
)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of module.

    Attributes:
        config: type of its config.
        title: name in messages.
        root: haiku path of a module on its own, as `ipa_jax.transform_ipa` and similar functions create it.
        landmarks: canonical names that identify it among other parameters; the first is enough if all parameters are
            of one module.
        parameters: function from its config to canonical names and shapes.
        infer: function from canonical names and shapes to its config.
        told_by_shapes: fields of its config that names and shapes of parameters determine.
        told_besides: function from a config to the paths of further such fields.
        part: the field that holds the nested config, and that config's type; None if there is none.
    """

    config: type
    title: str
    root: str
    landmarks: tuple[str, ...]
    parameters: Callable[[Any], Shapes]
    infer: Callable[[Mapping[str, tuple[int, ...]]], Config]
    told_by_shapes: tuple[str, ...]
    told_besides: Callable[[Any], tuple[str, ...]] = lambda config: ()
    part: tuple[str, type] | None = None

    @property
    def landmark(self) -> str:
        """The canonical name that identifies the kind among parameters of a single module."""
        return self.landmarks[0]

    def has_fields(self, names: Collection[str]) -> bool:
        """Returns True if its config has fields of all these names and requires no others."""
        fields = dataclasses.fields(self.config)
        needed = {x.name for x in fields if x.default is x.default_factory is dataclasses.MISSING}
        return needed <= set(names) <= {x.name for x in fields}

    def from_values(self, values: Mapping[str, Any]) -> Config:
        """Makes its config from the values of its fields, including those of nested configs."""
        if self.part is None:
            return self.config(**values)
        name, config = self.part
        return self.config(**{**values, name: KINDS[config].from_values(values[name])})


KINDS: dict[type, Kind] = {
    kind.config: kind
    for kind in (
        Kind(
            config=StructureModuleConfig,
            title="structure module",
            root="structure_module",
            landmarks=("initial_projection/weights",),
            parameters=structure_module_parameters,
            infer=infer_structure_module,
            told_by_shapes=(
                *("tied_layers", "num_layer_in_transition", "transition_factor", "sidechain_channel"),
                *("num_residual_block", "single_input_channel", "pair_input_channel", "input_norm"),
                *("sidechain_input", "num_layer_in_residual_block"),
            ),
            # In a structure module, the attention's position_scale must be 1.
            told_besides=lambda config: (
                "ipa.position_scale",
                *(() if config.tied_layers else ("num_layer",)),
                *(("distance_channel",) if config.input_norm or config.pair_input_channel is not None else ()),
                *(("project_initial_act",) if config.single_input_channel is not None else ()),
            ),
            part=("ipa", IPAConfig),
        ),
        Kind(
            config=IPATransformerConfig,
            title="IPA transformer",
            root="ipa_transformer",
            # The second name excludes a single block at a path named ipa_block.
            landmarks=("ipa_block/transition_layer_norm/scale", "affine_update/weights"),
            parameters=ipa_transformer_parameters,
            infer=infer_ipa_transformer,
            told_by_shapes=("num_layer", "num_token", "predict_points"),
            part=("block", IPABlockConfig),
        ),
        Kind(
            config=IPABlockConfig,
            title="IPA block",
            root="ipa_block",
            landmarks=("transition_layer_norm/scale",),
            parameters=ipa_block_parameters,
            infer=infer_ipa_block,
            told_by_shapes=("num_layer_in_transition", "transition_factor"),
            part=("ipa", IPAConfig),
        ),
        Kind(
            config=IPAConfig,
            title="invariant point attention",
            root="invariant_point_attention",
            landmarks=(POINT_WEIGHTS,),
            parameters=ipa_parameters,
            infer=infer_ipa,
            told_by_shapes=(
                "num_channel",
                "pair_channel",
                "num_head",
                "num_scalar_qk",
                "num_scalar_v",
                "num_point_qk",
                "num_point_v",
                "layout",
                "scalar_bias",
                "point_bias",
                "rotary_embedding",
                "pair_bias",
                "attention_2d_bias",
                "pair_value_channel",
                "pair_value_per_head",
            ),
        ),
        Kind(
            config=PredictedLDDTConfig,
            title="confidence head",
            root="predicted_lddt_head",
            landmarks=("act_0/weights",),
            parameters=predicted_lddt_parameters,
            infer=infer_predicted_lddt,
            told_by_shapes=("num_channel", "hidden_channel", "num_bin"),
        ),
    )
}
"""Row of each kind by its config type; a kind that contains another one precedes it."""


def kind_of(config: Config) -> Kind:
    """The row of the kind of module that a config describes.

    Raises:
        ValueError: `config` is not a config.
    """
    for kind in KINDS.values():
        if isinstance(config, kind.config):
            return kind
    names = ", ".join(config_type.__name__ for config_type in get_args(Config))
    raise ValueError(f"config must be one of {names}; got {config!r}")


def parameter_shapes(config: Config) -> Shapes:
    """Canonical parameter names and shapes of the module that a config describes.

    Raises:
        ValueError: `config` is not a config.
    """
    return kind_of(config).parameters(config)


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> Config:
    """Infers the config of any kind from canonical names and shapes; heads may be flattened or not.

    Raises:
        ValueError: parameters are missing or empty, or sizes do not divide by the number of heads.
    """
    kind = next((kind for kind in KINDS.values() if kind.landmark in shapes), KINDS[IPAConfig])
    return kind.infer(shapes)


def config_from_values(values: Mapping[str, Any]) -> Config:
    """Makes the config, of whatever kind, that has these fields and values.

    Raises:
        TypeError, KeyError, ValueError: there is no such config.
    """
    for kind in KINDS.values():
        if kind.has_fields(values):
            return kind.from_values(values)
    raise ValueError(f"no config has these fields: {', '.join(values)}")


def has_attention(config: Config) -> bool:
    """Returns True if the module is an attention or contains one."""
    return attention_of(config) is not None


def attention_of(config: Config) -> IPAConfig:
    """The config of the attention within a module, or of the attention itself; None for a confidence head."""
    return cast(IPAConfig, config if isinstance(config, IPAConfig) else getattr(config, "ipa", None))


def replace_attention(config: Config, ipa: IPAConfig) -> Config:
    """The config with its attention's config replaced."""
    part = kind_of(config).part
    if part is None:
        return ipa
    return replace(config, **{part[0]: replace_attention(getattr(config, part[0]), ipa)})  # type: ignore[arg-type]
