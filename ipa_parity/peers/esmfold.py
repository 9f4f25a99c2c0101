"""Runs `transformers`' EsmFold attention and structure module, which are OpenFold's, in PyTorch."""

from __future__ import annotations

from typing import Any, cast

from ipa_bridge.config import StructureModuleConfig
from ipa_bridge.weights import Weights, canonical_from_torch
from ipa_bridge.weights.tensors import torch_tensor
from ipa_parity.attention.cases import Case
from ipa_parity.attention.stages import Arrays
from ipa_parity.peers.stages import name_layers, name_stages, torch_gradients
from ipa_parity.structure_module.cases import StructureModuleCase
from ipa_parity.structure_module.stages import COTANGENT_SCALES


def esmfold_module(case: Case) -> Any:
    """`transformers`' EsmFold attention with the case's widths and weights, and with its own ε."""
    from transformers.models.esm.configuration_esm import StructureModuleConfig as EsmConfig
    from transformers.models.esm.modeling_esmfold import EsmFoldInvariantPointAttention

    config = case.config
    module = EsmFoldInvariantPointAttention(
        EsmConfig(
            sequence_dim=config.num_channel,
            pairwise_dim=config.pair_channel,
            ipa_dim=config.num_scalar_qk,
            num_heads_ipa=config.num_head,
            num_qk_points=config.num_point_qk,
            num_v_points=config.num_point_v,
        )
    )
    module.load_state_dict(case.weights.to_torch(dialect="esmfold"))
    return module


def run_esmfold(case: Case) -> Arrays:
    """Runs `transformers`' EsmFold attention on a case; it casts frames to float32."""
    import torch
    from transformers.models.esm.openfold_utils import Rigid, Rotation

    module = esmfold_module(case)

    def call(single: torch.Tensor, pair: torch.Tensor, rotation: torch.Tensor, translation: torch.Tensor) -> Any:
        frames = Rigid(Rotation(rot_mats=rotation), translation)
        return module(single, pair, frames, torch_tensor(case.mask).to(single.dtype))

    out, by_input, by_parameter = torch_gradients(case, module, call)
    return name_stages(out, by_input, canonical_from_torch(by_parameter, case.config, "esmfold"))


def esmfold_structure_module(weights: Weights) -> Any:
    """`transformers`' EsmFold structure module with these weights and its own ε."""
    from transformers.models.esm.configuration_esm import StructureModuleConfig as EsmConfig
    from transformers.models.esm.modeling_esmfold import EsmFoldStructureModule

    number = cast(StructureModuleConfig, weights.config).num_layer
    module = EsmFoldStructureModule(EsmConfig(num_blocks=number)).eval()
    module.load_state_dict(weights.to_torch(dialect="esmfold"))
    return module


def run_esmfold_structure_module(case: StructureModuleCase, *, gradients: bool = True) -> Arrays:
    """Runs `transformers`' EsmFold structure module on a case; it casts frames to float32."""
    import torch

    module, config = esmfold_structure_module(case.weights), case.config
    inputs = {"single": torch_tensor(case.single), "pair": torch_tensor(case.pair)}
    inputs = {name: x[None].requires_grad_(gradients) for name, x in inputs.items()}
    found = module(inputs, torch_tensor(case.aatype)[None], torch_tensor(case.mask)[None].to(inputs["single"].dtype))
    groups = found["sidechain_frames"][:, 0]
    output = {
        "rotation": groups[:, :, 0, :3, :3],
        "translation": groups[:, :, 0, :3, 3],
        "group_rotation": groups[..., :3, :3],
        "group_translation": groups[..., :3, 3],
        "unnormalized_angles": found["unnormalized_angles"][:, 0],
        "angles": found["angles"][:, 0],
        "atom14": found["positions"][:, 0],
        "act": found["states"][:, 0],
    }
    arrays = {}
    if gradients:
        cotangents = {field: COTANGENT_SCALES[field] * torch_tensor(x) for field, x in case.cotangents.items()}
        terms = [(output[field] * x).sum() for field, x in cotangents.items()]
        parameters = dict(module.named_parameters())
        grads = torch.autograd.grad(sum(terms), [*inputs.values(), *parameters.values()])
        arrays = {f"gradient/{name}": x[0].numpy() for name, x in zip(inputs, grads, strict=False)}
        by_name = {name: x.numpy() for name, x in zip(parameters, grads[len(inputs) :], strict=True)}
        arrays |= {f"gradient/{name}": x for name, x in canonical_from_torch(by_name, config, "esmfold").items()}
    detached = {field: x.detach().numpy() for field, x in output.items()}
    return name_layers(detached, config.num_layer) | arrays
