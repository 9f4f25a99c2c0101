"""Adapters: our attention with the constructor and the call of AlphaFold's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from ipa_bridge.config import Implementation, IPAConfig
from ipa_jax.invariant_point_attention import InvariantPointAttention
from ipa_jax.rigid import Rigid


def replaced_class(original: Any, preset: IPAConfig, implementation: Implementation | None) -> Any:
    """Our attention with the constructor and the call of AlphaFold's, which is `original`."""

    class Replacement(InvariantPointAttention):
        """Our attention, built and called as AlphaFold builds and calls its own."""

        ipa_twins_original = original

        def __init__(
            self,
            config: Any,
            global_config: Any,
            dist_epsilon: float = 1e-8,
            name: str = "invariant_point_attention",
        ) -> None:
            ours = replace(
                preset,
                **_widths(config),
                norm_epsilon=dist_epsilon,
                frame_unit=None,  # AlphaFold has scaled its frames
                zero_init=bool(global_config.zero_init),
            )
            super().__init__(ours, implementation=implementation, name=name)

    def attend(self: Any, single: Array, pair: Array, mask: Array, rigids: Rigid) -> Any:
        self.config = replace(self.config, pair_channel=pair.shape[-1])
        single = single.astype(jnp.promote_types(single.dtype, rigids.translation.dtype))  # AlphaFold's output dtype
        return InvariantPointAttention.__call__(self, single, pair, rigids, mask[..., 0])

    class Monomer(Replacement):
        def __call__(self, inputs_1d: Array, inputs_2d: Array, mask: Array, affine: Any) -> Array:  # type: ignore[override]
            rotation = jnp.stack([jnp.stack(row, -1) for row in affine.rotation], -2)
            return attend(self, inputs_1d, inputs_2d, mask, Rigid(rotation, jnp.stack(affine.translation, -1)))

    class Multimer(Replacement):
        def __call__(self, inputs_1d: Array, inputs_2d: Array, mask: Array, rigid: Any) -> Array:  # type: ignore[override]
            rigids = Rigid(rigid.rotation.to_array(), rigid.translation.to_array())
            return attend(self, inputs_1d, inputs_2d, mask, rigids)

    return Monomer if preset.layout == "monomer" else Multimer


def original_class(attention: Any) -> Any:
    """AlphaFold's own class, also if it was replaced."""
    return getattr(attention, "ipa_twins_original", attention)


def _widths(config: Any) -> dict[str, Any]:
    """Fields that have the same name in AlphaFold's config of a structure module and in `IPAConfig`."""
    fields = ("num_channel", "num_head", "num_scalar_qk", "num_scalar_v", "num_point_qk", "num_point_v")
    return {field: getattr(config, field) for field in fields}
