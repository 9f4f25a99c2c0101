"""The confidence head, pLDDT (Jumper et al. 2021, Suppl. 1.9.6 and Alg. 29)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ipa_bridge.checks import check_arrays, check_config, check_floating
from ipa_bridge.config import PredictedLDDTConfig
from ipa_torch.dtypes import at_least_float32
from ipa_torch.layers import LayerNorm, Linear, Module


class PredictedLDDT(Module):
    """Logits over bins of each residue's lDDT-Cα, with the parameters of AlphaFold's `predicted_lddt_head`."""

    def __init__(self, config: PredictedLDDTConfig) -> None:
        check_config(config, PredictedLDDTConfig)
        super().__init__()
        self.config = c = config
        self.input_layer_norm = LayerNorm(c.num_channel)
        self.act_0 = Linear(c.num_channel, c.hidden_channel, initializer="relu")
        self.act_1 = Linear(c.hidden_channel, c.hidden_channel, initializer="relu")
        self.logits = Linear(c.hidden_channel, c.num_bin, initializer="zeros" if c.zero_init else "linear")

    def forward(self, act: Float[Tensor, "*B N c_s"]) -> Float[Tensor, "*B N bins"]:
        """Reads the activations of the structure module's last layer (Alg. 29, lines 1–3)."""
        check_arrays(Tensor, act=act)
        check_floating(act=act)
        hidden = self.input_layer_norm(act)
        return self.logits(F.relu(self.act_1(F.relu(self.act_0(hidden)))))

    if TYPE_CHECKING:  # nn.Module.__call__ is typed as returning Any
        __call__ = forward


def predicted_lddt(logits: Float[Tensor, "*B N bins"]) -> Float[Tensor, "*B N"]:
    """The expected lDDT-Cα, from 0 to 100, in at least float32 (Alg. 29, lines 4–6)."""
    dtype = at_least_float32(logits.dtype)
    num_bin = logits.shape[-1]
    centres = (torch.arange(num_bin, dtype=dtype, device=logits.device) + 0.5) / num_bin
    return 100 * torch.sum(torch.softmax(logits.to(dtype), -1) * centres, -1)
