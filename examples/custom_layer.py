"""An attention of your own: register its names and its call, then convert its weights and let ours compute it.

python examples/custom_layer.py

The command `ipa-port` reads the same registration: ipa-port inspect FILE --import custom_layer
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from torch import Tensor, nn

import ipa_bridge
import ipa_torch
from ipa_bridge import IPAConfig
from ipa_bridge.weights.dialects import Dialect, Form, Order, Row


class LoomAttention(nn.Module):
    """An attention with names, orders and a call of its own; it returns its input plus the update."""

    def __init__(self, width: int, edge_width: int, heads: int = 4, channels: int = 8, points: int = 4) -> None:
        super().__init__()
        self.heads, self.eps = heads, 1e-6
        self.query, self.key, self.value = (nn.Linear(width, heads * channels, bias=False) for _ in range(3))
        self.query_xyz, self.key_xyz, self.value_xyz = (nn.Linear(width, heads * points * 3) for _ in range(3))
        self.edge = nn.Linear(edge_width, heads)
        self.sharpness = nn.Parameter(torch.zeros(heads))
        self.mix = nn.Linear(heads * (channels + 4 * points + edge_width), width)
        self.norm = nn.LayerNorm(width)

    def forward(
        self, nodes: Tensor, frames: tuple[Tensor, Tensor], edges: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """Updated nodes, from frames (rotations, origins) and edges; `keep` hides residues from all others."""
        rotations, origins = frames

        def points(of: nn.Linear) -> Tensor:
            local = of(nodes).unflatten(-1, (self.heads, -1, 3))  # head, point, xyz
            return torch.einsum("bicd,bihpd->bihpc", rotations, local) + origins[:, :, None, None]

        q, k, v = (of(nodes).unflatten(-1, (self.heads, -1)) for of in (self.query, self.key, self.value))
        q_xyz, k_xyz, v_xyz = (points(of) for of in (self.query_xyz, self.key_xyz, self.value_xyz))
        squares = (q_xyz[:, :, None] - k_xyz[:, None]).square().sum((-1, -2))
        scale = (q_xyz.shape[-2] * 9 / 2) ** -0.5
        logits = torch.einsum("bihc,bjhc->bijh", q, k) * q.shape[-1] ** -0.5 + self.edge(edges)
        logits = (logits - 0.5 * scale * nn.functional.softplus(self.sharpness) * squares) * 3**-0.5
        if keep is not None:
            logits = logits.masked_fill(~keep[:, None, :, None], -torch.inf)
        weights = logits.softmax(2)
        read = torch.einsum("bijh,bjhpc->bihpc", weights, v_xyz) - origins[:, :, None, None]
        read = torch.einsum("bicd,bihpc->bihpd", rotations, read)
        lengths = (read.square().sum(-1) + self.eps).sqrt()
        scalars = torch.einsum("bijh,bjhc->bihc", weights, v)
        from_edges = torch.einsum("bijh,bijc->bihc", weights, edges)
        parts = [x.flatten(2) for x in (scalars, read, lengths, from_edges)]
        return self.norm(nodes + self.mix(torch.cat(parts, -1)))


LOOM = Dialect(
    name="loom",
    title="Loom",
    rows={
        IPAConfig: {
            "multimer": (  # our module, theirs, and the order of features where it differs
                Row("trainable_point_weights", "sharpness"),
                Row("q_scalar_projection", "query"),
                Row("k_scalar_projection", "key"),
                Row("v_scalar_projection", "value"),
                Row("q_point_projection/point_projection", "query_xyz", outputs=Order("h c q", "h q c")),
                Row("k_point_projection/point_projection", "key_xyz", outputs=Order("h c q", "h q c")),
                Row("v_point_projection/point_projection", "value_xyz", outputs=Order("h c p", "h p c")),
                Row("attention_2d", "edge"),
                Row("output_projection", "mix", inputs=Order("h s|c h p|h p|h z", "h s|h p c|h p|h z")),
            )
        }
    },
    forms={"multimer": Form(scalar_bias=False, point_bias=True, norm_form="add", norm_epsilon=1e-6)},
    landmarks={IPAConfig: ("sharpness", "query_xyz.weight", "mix.weight")},
    beside=("norm",),  # a layer of its own, which is no part of the attention
    finish=lambda config: replace(config, frame_unit=1.0),  # origins are in Å
    varies=("norm_epsilon",),
)


def to_ours(layer, nodes, frames, edges, keep=None):
    """Arguments of our module from those of the layer's call."""
    return {"single": nodes, "pair": edges, "rigids": ipa_torch.Rigid(*frames), "key_mask": keep}


def to_theirs(single, pair, rotation, translation, mask):
    """Arguments of the layer's call, for the comparison before and after."""
    return {"nodes": single, "frames": (rotation, translation), "edges": pair, "keep": mask.bool()}


def result(layer, output, nodes, **others):
    """Turns our attention's output into the layer's: residual sum and layer norm."""
    return layer.norm(nodes + output)


ipa_bridge.register_dialect(LOOM)
ipa_torch.register_adapter("loom", to_ours=to_ours, to_theirs=to_theirs, result=result)


def main() -> None:
    """Replaces the attention in a small model and reads its weights."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": LoomAttention(32, 16)})
    print(ipa_torch.replace_ipa(model))
    weights = ipa_bridge.Weights.from_torch(model.state_dict(), dialect="loom")
    print(weights.config)


if __name__ == "__main__":
    main()
