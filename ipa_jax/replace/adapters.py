"""Adapters: our attention with the constructor and the call of AlphaFold's."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from ipa_bridge.config import Implementation, IPAConfig
from ipa_jax.invariant_point_attention import InvariantPointAttention
from ipa_jax.rigid import Rigid


def replaced_class(original: Any, preset: IPAConfig, implementation: Implementation | None) -> Any:
    """Our attention with the constructor and the call of AlphaFold's, which is `original`."""
    usual: dict[str, Any] = {"dist_epsilon": 1e-8, "name": "invariant_point_attention"}
    usual |= {name: x.default for name, x in arguments_of(original.__init__).items() if name in usual}

    class Replacement(InvariantPointAttention):
        """Our attention, built and called as AlphaFold builds and calls its own."""

        ipa_twins_original = original

        def __init__(
            self,
            config: Any,
            global_config: Any,
            dist_epsilon: float = usual["dist_epsilon"],
            name: str = usual["name"],
            **others: Any,
        ) -> None:
            _check_defaults(original.__init__, others)
            ours = replace(
                preset,
                **_widths(config),
                norm_epsilon=dist_epsilon,
                frame_unit=None,  # AlphaFold has scaled its frames
                zero_init=bool(global_config.zero_init),
            )
            super().__init__(ours, implementation=implementation, name=name)

    def attend(self: Any, single: Array, pair: Array, mask: Array, rigids: Rigid, others: dict[str, Any]) -> Any:
        _check_defaults(original.__call__, others)
        if mask.shape != (len(single), 1):
            raise ValueError(
                f"mask must have the shape (residues, 1), here {(len(single), 1)}; got {mask.shape}: for a mask of "
                "pairs, restore AlphaFold's own InvariantPointAttention"
            )
        self.config = replace(self.config, pair_channel=pair.shape[-1])
        single = single.astype(jnp.promote_types(single.dtype, rigids.translation.dtype))  # AlphaFold's output dtype
        return InvariantPointAttention.__call__(self, single, pair, rigids, mask[..., 0])

    class Monomer(Replacement):
        def __call__(  # type: ignore[override]
            self, inputs_1d: Array, inputs_2d: Array, mask: Array, affine: Any, **others: Any
        ) -> Array:
            rotation = jnp.stack([jnp.stack(row, -1) for row in affine.rotation], -2)
            rigids = Rigid(rotation, jnp.stack(affine.translation, -1))
            return attend(self, inputs_1d, inputs_2d, mask, rigids, others)

    class Multimer(Replacement):
        def __call__(  # type: ignore[override]
            self, inputs_1d: Array, inputs_2d: Array, mask: Array, rigid: Any, **others: Any
        ) -> Array:
            rigids = Rigid(rigid.rotation.to_array(), rigid.translation.to_array())
            return attend(self, inputs_1d, inputs_2d, mask, rigids, others)

    return Monomer if preset.layout == "monomer" else Multimer


def original_class(attention: Any) -> Any:
    """AlphaFold's own class, also if it was replaced."""
    return getattr(attention, "ipa_twins_original", attention)


def arguments_of(method: Any) -> dict[str, inspect.Parameter]:
    """Arguments of a method without `self`, by name; none if Python cannot tell them."""
    try:
        return dict(list(inspect.signature(method).parameters.items())[1:])
    except (TypeError, ValueError):
        return {}


def _check_defaults(function: Any, others: dict[str, Any]) -> None:
    """Checks that arguments which AlphaFold's attention has not are at the defaults of a copy's.

    Raises:
        ValueError: one is not.
        TypeError: the copy's own class has no such argument.
    """
    for name, value in others.items():
        parameter = arguments_of(function).get(name)
        if parameter is None:
            raise TypeError(f"InvariantPointAttention got an unexpected argument {name!r}")
        default = parameter.default
        if value is not default and not (isinstance(value, bool | int | float | str) and value == default):
            raise ValueError(
                f"{name} of a replaced InvariantPointAttention must be {default!r}, its default: AlphaFold's has no "
                f"such argument; got {value!r}; to use it, restore the package's own class"
            )


def _widths(config: Any) -> dict[str, Any]:
    """Fields that have the same name in AlphaFold's config of a structure module and in `IPAConfig`."""
    fields = ("num_channel", "num_head", "num_scalar_qk", "num_scalar_v", "num_point_qk", "num_point_v")
    return {field: getattr(config, field) for field in fields}
