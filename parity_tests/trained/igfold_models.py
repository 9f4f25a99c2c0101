"""IgFold's published models, whose licence allows non-commercial use only."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import antiberty
import jax
import numpy as np
import torch
from igfold import IgFoldInput
from igfold.utils.checkpoint import find_weights, load_model
from torch import nn
from trained_layers import Call
from trained_models import HEAVY, LIGHT, Trained, arrays
from transformers import BertConfig, BertModel

import ipa_jax
from ipa_bridge.weights import Weights


@cache
def language_model() -> Callable[[str], tuple[torch.Tensor, torch.Tensor]]:
    """AntiBERTy 0.1.3: embeddings and attentions of a sequence's residues.

    Its own runner needs an older transformers: the pinned one cannot load its class, and reads its vocabulary as
    unknown words without an error. It is a plain BERT, so transformers' class runs it on its config, weights and words.
    """
    folder = Path(antiberty.__file__).parent / "trained_models"
    words = {word: i for i, word in enumerate((folder / "vocab.txt").read_text().split())}
    checkpoint = folder / "AntiBERTy_md_smooth"
    bert = BertModel(BertConfig.from_pretrained(checkpoint, attn_implementation="eager")).eval()
    state = torch.load(checkpoint / "pytorch_model.bin", weights_only=True, map_location="cpu")
    state = {name.removeprefix("bert."): x for name, x in state.items() if name.startswith("bert.")}
    state.pop("embeddings.position_ids")  # a buffer of older versions
    bert.load_state_dict(state)

    def embed(sequence: str) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.tensor([[words["[CLS]"], *(words[x] for x in sequence), words["[SEP]"]]])
        with torch.no_grad():
            out = bert(input_ids=tokens, output_attentions=True)
        return out.last_hidden_state[:, 1:-1], torch.stack(out.attentions, 1)[..., 1:-1, 1:-1]

    return embed


@cache
def embedded() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Embeddings and attentions of both chains."""
    return [language_model()(chain) for chain in (HEAVY, LIGHT)]


def output(model: nn.Module) -> Any:
    """IgFold's output without a template, before its refinement."""
    dtype, atoms = next(model.parameters()).dtype, 4 * len(HEAVY + LIGHT)
    with torch.no_grad():
        return model(
            IgFoldInput(
                *([x.to(dtype) for x in part] for part in zip(*embedded(), strict=True)),
                template_coords=torch.zeros(1, atoms, 3, dtype=dtype),
                template_mask=torch.zeros(1, atoms, dtype=torch.bool),
            )
        )


def _fold(model: nn.Module) -> torch.Tensor:
    """Coordinates of N, Cα, C and Cβ, in Å."""
    return output(model).coords[0, :, :4].flatten(0, 1)


def _read(arguments: tuple, named: dict) -> Call:
    (single,) = arguments
    leaves = {"single": single, "pair": named["pairwise_repr"], "translation": named["translations"]}
    leaves["rotation"] = named["rotations"].transpose(-1, -2)
    return Call(arrays(leaves), {}, {name: named[name] for name in ("mask", "key_padding_mask")})


def _run(layer: nn.Module, leaves: dict[str, torch.Tensor], extra: dict[str, Any]) -> torch.Tensor:
    rotations = leaves["rotation"].transpose(-1, -2)
    return layer(leaves["single"], leaves["pair"], rotations=rotations, translations=leaves["translation"], **extra)


def _all_valid(call: Call) -> bool:
    """False with masked residues: these attend to all alike in IgFold, and by their weights in our modules."""
    return bool(call.extra["mask"].all())


def _widened(get_ideal_coords: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    return lambda: get_ideal_coords().double()


IGFOLD = {
    f"IgFold {Path(path).stem[-1]}": Trained(
        package="igfold",
        file=f"trained_models/IgFold/{Path(path).name}",
        dialect="igfold",
        layers=7,
        load=partial(load_model, path),
        predict=_fold,
        read=_read,
        run=_run,
        noisy=("str_node_transform", "str_edge_transform", "dev_node_transform", "dev_edge_transform"),
        comparable=_all_valid,
        widened=tuple(
            (f"igfold.model.{module}", "get_ideal_coords", _widened)
            for module in ("IgFold", "components.IPATransformer")
        ),
    )
    for path in find_weights()
}
"""IgFold's four checkpoints, by name."""


class HaikuAttention(nn.Module):
    """Our Haiku attention in the place of IgFold's, through numpy; without gradients."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.params = weights.to_haiku()
        self.apply_ipa = jax.jit(ipa_jax.transform_ipa(weights.config).apply)

    def forward(
        self,
        single: torch.Tensor,
        pairwise_repr: torch.Tensor,
        *,
        rotations: torch.Tensor,
        translations: torch.Tensor,
        mask: torch.Tensor,
        key_padding_mask: torch.Tensor,
    ) -> torch.Tensor:
        """The update of the single representation, where all residues are valid."""
        assert mask.all()
        assert key_padding_mask.all()
        rigids = ipa_jax.Rigid(rotations.transpose(-1, -2).contiguous().numpy(), translations.numpy())
        out = self.apply_ipa(self.params, single.numpy(), pairwise_repr.numpy(), rigids)
        return torch.from_numpy(np.array(out))


def with_haiku(trained: Trained, model: nn.Module, paths: list[str]) -> nn.Module:
    """A copy of the model whose attentions at these paths are our Haiku module."""
    model = copy.deepcopy(model)
    for path in paths:
        model.set_submodule(path, HaikuAttention(Weights.load(trained.path, root=path, dialect="igfold")))
    return model
