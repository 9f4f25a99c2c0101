"""Published implementations of IPA, run on our cases under our names: independent witnesses of what it is.

Each takes a case whose cotangent is zero in masked rows, since what a masked query attends to differs between
systems, and returns `out` and gradients as `stages` does. Parameters and their gradients go through its dialect.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np

from ipa_bridge.config import IPAConfig, StructureModuleConfig
from ipa_bridge.proteins import residues
from ipa_bridge.weights import Weights, canonical_from_haiku, canonical_from_torch
from ipa_bridge.weights.tensors import torch_tensor
from ipa_parity.cases import Case
from ipa_parity.stages import Arrays
from ipa_parity.structure_module import COTANGENT_SCALES, StructureModuleCase


def alphafold_forward(config: IPAConfig) -> Callable[..., Any]:
    """`alphafold-colabfold`'s attention of the config's layout, to be called inside an `hk.transform`.

    It takes single, pair, mask (all without batch axes), rotation and translation.
    """
    import ml_collections
    from alphafold.model import folding, folding_multimer, quat_affine
    from alphafold.model.geometry import Rigid3Array, Rot3Array, Vec3Array

    widths = ("num_channel", "num_head", "num_scalar_qk", "num_scalar_v", "num_point_qk", "num_point_v")
    module_config = ml_collections.ConfigDict({name: getattr(config, name) for name in widths})
    global_config = ml_collections.ConfigDict({"zero_init": config.zero_init})

    def forward(single: Any, pair: Any, mask: Any, rotation: Any, translation: Any) -> Any:
        if config.layout == "monomer":
            frames = quat_affine.QuatAffine(None, translation, rotation=rotation, unstack_inputs=True)
            module = folding.InvariantPointAttention(module_config, global_config)
        else:
            frames = Rigid3Array(Rot3Array.from_array(rotation), Vec3Array.from_array(translation))
            module = folding_multimer.InvariantPointAttention(module_config, global_config)
        return module(single, pair, mask[..., None].astype(single.dtype), frames)

    return forward


def run_alphafold(case: Case) -> Arrays:
    """`alphafold-colabfold`'s haiku module, given our haiku parameters as they are."""
    import haiku as hk
    import jax

    transformed: Any = hk.without_apply_rng(hk.transform(alphafold_forward(case.config)))
    names = ("single", "pair", "rotation", "translation")

    def loss(params: Any, inputs: Mapping[str, Any]) -> Any:
        single, pair, rotation, translation = (inputs[name] for name in names)
        out = transformed.apply(params, single, pair, mask, rotation, translation)
        return (out * cotangent).sum(), out

    # Its multimer geometry asserts float32, which its own float64 constants break where x64 is on.
    with (
        jax.enable_x64(case.single.dtype == np.float64),
        jax.numpy_dtype_promotion("standard"),
        jax.default_matmul_precision("highest"),
    ):
        params = jax.tree.map(jax.numpy.asarray, case.weights.to_haiku())
        inputs = {name: jax.numpy.asarray(getattr(case, name)) for name in names}
        mask, cotangent = jax.numpy.asarray(case.mask), jax.numpy.asarray(case.cotangent)
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        (by_module, by_input), out = jax.tree.map(np.asarray, gradient(params, inputs))
    return _named(out, by_input, canonical_from_haiku(by_module, case.weights.root))


def esmfold_module(case: Case) -> Any:
    """`transformers`' EsmFold attention with the case's widths and weights; ε is its own."""
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
    """`transformers`' EsmFold attention; its frames are float32 whatever they are given."""
    import torch
    from transformers.models.esm.openfold_utils import Rigid, Rotation

    module = esmfold_module(case)

    def call(single: torch.Tensor, pair: torch.Tensor, rotation: torch.Tensor, translation: torch.Tensor) -> Any:
        frames = Rigid(Rotation(rot_mats=rotation), translation)
        return module(single, pair, frames, torch_tensor(case.mask).to(single.dtype))

    out, by_input, by_parameter = _torch_gradients(case, module, call)
    return _named(out, by_input, canonical_from_torch(by_parameter, case.config, "esmfold"))


def lucidrains_module(config: IPAConfig) -> Any:
    """The attention of the PyPI package `invariant-point-attention` with the config's widths and its own weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from invariant_point_attention import InvariantPointAttention

    return InvariantPointAttention(
        dim=config.num_channel,
        heads=config.num_head,
        scalar_key_dim=config.num_scalar_qk,
        scalar_value_dim=config.num_scalar_v,
        point_key_dim=config.num_point_qk,
        point_value_dim=config.num_point_v,
        pairwise_repr_dim=config.pair_channel,
        require_pairwise_repr=config.pair_channel is not None,
        eps=config.norm_epsilon,
    )


def run_lucidrains(case: Case) -> Arrays:
    """The PyPI package `invariant-point-attention`: row-vector frames, points with the coordinate innermost."""
    import torch

    module = lucidrains_module(case.config)
    state = case.weights.to_torch(dialect="lucidrains")
    module.to(state["point_weights"].dtype).load_state_dict(state)
    batched = case.single.ndim == 3

    def call(single: torch.Tensor, pair: Any, rotation: torch.Tensor, translation: torch.Tensor) -> Any:
        mask = torch_tensor(case.mask)
        arguments = (single, pair, rotation.transpose(-1, -2), translation, mask)
        if not batched:
            arguments = tuple(None if x is None else x[None] for x in arguments)  # type: ignore[assignment]
        single, pair, rotations, translations, mask = arguments
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = module(single, pair, rotations=rotations, translations=translations, mask=mask)
        return out if batched else out[0]

    out, by_input, by_parameter = _torch_gradients(case, module, call)
    return _named(out, by_input, canonical_from_torch(by_parameter, case.config, "lucidrains"))


def _torch_gradients(case: Case, module: Any, call: Callable) -> tuple[np.ndarray, Arrays, Arrays]:
    import torch

    names = ("single", "pair", "rotation", "translation")
    inputs = {name: x for name in names if (x := getattr(case, name)) is not None}
    leaves = {name: torch_tensor(x).requires_grad_() for name, x in inputs.items()}
    parameters = dict(module.named_parameters())
    out = call(*(leaves.get(name) for name in names))
    loss = (out * torch_tensor(case.cotangent)).sum()
    grads = [x.numpy() for x in torch.autograd.grad(loss, [*leaves.values(), *parameters.values()])]
    return (
        out.detach().numpy(),
        dict(zip(leaves, grads[: len(leaves)], strict=True)),
        dict(zip(parameters, grads[len(leaves) :], strict=True)),
    )


def _named(out: np.ndarray, by_input: Arrays, by_name: Arrays) -> Arrays:
    return {"out": out} | {f"gradient/{name}": x for name, x in {**by_input, **by_name}.items()}


def alphafold_structure_module(case: StructureModuleCase) -> Callable[..., dict[str, Any]]:
    """`alphafold-colabfold`'s structure module of the config's layout on a case's sequence, to be transformed."""
    import jax
    import ml_collections
    from alphafold.model import folding, folding_multimer, r3
    from alphafold.model.config import model_config

    multimer = case.config.ipa.layout == "multimer"
    config = model_config("model_1_multimer_v3" if multimer else "model_1").model
    with config.unlocked():
        config.heads.structure_module.num_layer = case.config.num_layer
    module = folding_multimer.StructureModule if multimer else folding.StructureModule
    global_config = ml_collections.ConfigDict({"deterministic": True, "zero_init": True})
    aatype, exists = case.aatype, residues.ATOM14_MASK[case.aatype]

    def forward(single: Any, pair: Any) -> dict[str, Any]:
        batch = {
            "aatype": jax.numpy.asarray(aatype),
            "seq_mask": jax.numpy.asarray(case.mask, single.dtype),
            "atom14_atom_exists": jax.numpy.asarray(exists, single.dtype),
            "atom37_atom_exists": jax.numpy.asarray(residues.ATOM37_MASK[aatype], single.dtype),
            "residx_atom37_to_atom14": jax.numpy.asarray(residues.ATOM37_TO_ATOM14[aatype]),
        }
        options = {"compute_loss": True} if multimer else {}
        representations = {"single": single, "pair": pair}
        head = module(config.heads.structure_module, global_config)
        found = head(representations, batch, is_training=False, **options)
        angles, atoms, groups = (found["sidechains"][key] for key in ("angles_sin_cos", "atom_pos", "frames"))
        if not multimer:
            flat, atoms = r3.rigids_to_tensor_flat12(groups), r3.vecs_to_tensor(atoms)
            groups = jax.numpy.concatenate([flat[..., :9].reshape(*flat.shape[:-1], 3, 3), flat[..., 9:, None]], -1)
        last = found["act"] if multimer else found["representations"]["structure_module"]
        return {
            "rotation": groups[:, :, 0, :, :3],
            "translation": groups[:, :, 0, :, 3],
            "group_rotation": groups[..., :3],
            "group_translation": groups[..., 3],
            "unnormalized_angles": found["sidechains"]["unnormalized_angles_sin_cos"],
            "angles": angles,
            "atom14": atoms,
            "act": last,
            "atom37": found["final_atom_positions"],
        }

    return forward


def run_alphafold_structure_module(case: StructureModuleCase, *, gradients: bool = True) -> Arrays:
    """`alphafold-colabfold`'s structure module of the config's layout, given our haiku parameters as they are.

    Of the activations it returns the last layer's only; gradients are those of `_combination` in our stages.
    """
    import haiku as hk
    import jax

    transformed: Any = hk.transform(alphafold_structure_module(case))

    def loss(params: Any, inputs: Mapping[str, Any]) -> Any:
        output = transformed.apply(params, jax.random.key(0), inputs["single"], inputs["pair"])
        last = {**case.cotangents, "act": case.cotangents["act"][-1]}
        return sum(COTANGENT_SCALES[field] * (output[field] * x).sum() for field, x in last.items()), output

    # Its multimer geometry asserts float32, which its own float64 constants break where x64 is on.
    with (
        jax.enable_x64(case.single.dtype == np.float64),
        jax.numpy_dtype_promotion("standard"),
        jax.default_matmul_precision("highest"),
    ):
        params = jax.tree.map(jax.numpy.asarray, case.weights.to_haiku())
        inputs = {"single": jax.numpy.asarray(case.single), "pair": jax.numpy.asarray(case.pair)}
        if gradients:
            (by_module, by_input), output = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, inputs)
            grads = {**by_input, **canonical_from_haiku(by_module, case.weights.root)}
        else:
            output, grads = jax.jit(lambda p, x: loss(p, x)[1])(params, inputs), {}
        output, grads = jax.tree.map(np.asarray, (output, grads))
    return _named_structure_module(output, case.config.num_layer) | {f"gradient/{name}": x for name, x in grads.items()}


def esmfold_structure_module(weights: Weights) -> Any:
    """`transformers`' EsmFold structure module with these weights; ε is its own."""
    from transformers.models.esm.configuration_esm import StructureModuleConfig as EsmConfig
    from transformers.models.esm.modeling_esmfold import EsmFoldStructureModule

    number = cast(StructureModuleConfig, weights.config).num_layer
    module = EsmFoldStructureModule(EsmConfig(num_blocks=number)).eval()  # with its own ε
    module.load_state_dict(weights.to_torch(dialect="esmfold"))
    return module


def run_esmfold_structure_module(case: StructureModuleCase, *, gradients: bool = True) -> Arrays:
    """`transformers`' EsmFold structure module; its frames are float32 whatever they are given."""
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
    return _named_structure_module(detached, config.num_layer) | arrays


def _named_structure_module(output: Mapping[str, np.ndarray], num_layer: int) -> Arrays:
    """Stages by layer; what only the last layer has is the last layer's."""
    arrays: Arrays = {}
    for field, x in output.items():
        layers = {f"{field}/layer {i + 1}": y for i, y in enumerate(x)} if len(x) == num_layer else {}
        arrays |= layers or {f"{field}/layer {num_layer}": x}
    return arrays
