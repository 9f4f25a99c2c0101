"""Runs `alphafold-colabfold`: DeepMind's attention and structure module of both layouts, in Haiku."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ipa_bridge.config import IPAConfig
from ipa_bridge.proteins import residues
from ipa_bridge.weights import canonical_from_haiku
from ipa_parity.attention.cases import Case
from ipa_parity.attention.stages import Arrays
from ipa_parity.peers.stages import name_layers, name_stages
from ipa_parity.structure_module.cases import StructureModuleCase
from ipa_parity.structure_module.stages import COTANGENT_SCALES


def alphafold_forward(config: IPAConfig) -> Callable[..., Any]:
    """`alphafold-colabfold`'s attention of the config's layout, as a function to call inside an `hk.transform`.

    The function takes single, pair, mask (all without batch axes), rotation and translation.
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
    """Runs `alphafold-colabfold`'s Haiku module on our Haiku parameters, unchanged."""
    import haiku as hk
    import jax

    transformed: Any = hk.without_apply_rng(hk.transform(alphafold_forward(case.config)))
    names = ("single", "pair", "rotation", "translation")

    def loss(params: Any, inputs: Mapping[str, Any]) -> Any:
        single, pair, rotation, translation = (inputs[name] for name in names)
        out = transformed.apply(params, single, pair, mask, rotation, translation)
        return (out * cotangent).sum(), out

    # AlphaFold's multimer geometry asserts float32; with x64 on, its own float64 constants would fail that.
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
    return name_stages(out, by_input, canonical_from_haiku(by_module, case.weights.root))


def alphafold_structure_module(case: StructureModuleCase) -> Callable[..., dict[str, Any]]:
    """`alphafold-colabfold`'s structure module on a case's sequence, as a function to call inside an `hk.transform`."""
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
    """Runs `alphafold-colabfold`'s structure module of the config's layout on our Haiku parameters, unchanged.

    Activations are returned for the last layer only. Gradients are of the combination that our stages use too.
    """
    import haiku as hk
    import jax

    transformed: Any = hk.transform(alphafold_structure_module(case))

    def loss(params: Any, inputs: Mapping[str, Any]) -> Any:
        output = transformed.apply(params, jax.random.key(0), inputs["single"], inputs["pair"])
        last = {**case.cotangents, "act": case.cotangents["act"][-1]}
        return sum(COTANGENT_SCALES[field] * (output[field] * x).sum() for field, x in last.items()), output

    # AlphaFold's multimer geometry asserts float32; with x64 on, its own float64 constants would fail that.
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
    return name_layers(output, case.config.num_layer) | {f"gradient/{name}": x for name, x in grads.items()}
