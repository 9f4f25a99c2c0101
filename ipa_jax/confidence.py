"""The confidence head, pLDDT (Jumper et al. 2021, Suppl. 1.9.6 and Alg. 29)."""

from __future__ import annotations

import haiku as hk
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ipa_bridge.checks import check_config, check_floating
from ipa_bridge.config import PredictedLDDTConfig
from ipa_jax.dtypes import at_least_float32
from ipa_jax.layers import LayerNorm, Linear, without_rng


class PredictedLDDT(hk.Module):
    """Logits over bins of each residue's lDDT-Cα, with the parameters of AlphaFold's `predicted_lddt_head`."""

    def __init__(self, config: PredictedLDDTConfig, *, name: str = "predicted_lddt_head") -> None:
        check_config(config, PredictedLDDTConfig)
        super().__init__(name=name)
        self.config = config

    def __call__(self, act: Float[Array, "*B N c_s"]) -> Float[Array, "*B N bins"]:
        """Reads the activations of the structure module's last layer (Alg. 29, lines 1–3)."""
        check_floating(act=act)
        c = self.config
        hidden = LayerNorm(name="input_layer_norm")(act)
        hidden = jax.nn.relu(Linear(c.hidden_channel, initializer="relu", name="act_0")(hidden))
        hidden = jax.nn.relu(Linear(c.hidden_channel, initializer="relu", name="act_1")(hidden))
        return Linear(c.num_bin, initializer="zeros" if c.zero_init else "linear", name="logits")(hidden)


def predicted_lddt(logits: Float[Array, "*B N bins"]) -> Float[Array, "*B N"]:
    """The expected lDDT-Cα, from 0 to 100, in at least float32 (Alg. 29, lines 4–6)."""
    dtype = at_least_float32(logits.dtype)
    num_bin = logits.shape[-1]
    centres = (jnp.arange(num_bin, dtype=dtype) + 0.5) / num_bin
    return 100 * jnp.sum(jax.nn.softmax(logits.astype(dtype), -1) * centres, -1)


def transform_predicted_lddt(config: PredictedLDDTConfig) -> hk.Transformed:
    """The confidence head as a pair of pure functions, init(rng, act) and apply(params, act)."""
    check_config(config, PredictedLDDTConfig)
    return without_rng(hk.transform(lambda act: PredictedLDDT(config)(act)), "act")
