"""Published implementations of IPA, run on our cases under our names: independent witnesses of what it is.

Each takes a case whose cotangent is zero in masked rows, since what a masked query attends to differs between
systems, and returns `out` and gradients as `stages` does. Conversions follow each system's own layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ipa_bridge.config import IPAConfig
from ipa_bridge.tensors import torch_tensor
from ipa_bridge.weights import canonical_from_haiku, canonical_from_torch
from ipa_parity.cases import Case
from ipa_parity.stages import Arrays


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


ESMFOLD_NAMES = {
    "linear_q": "q_scalar",
    "linear_kv": "kv_scalar",
    "linear_q_points": "q_point_local",
    "linear_kv_points": "kv_point_local",
    "linear_b": "attention_2d",
    "linear_out": "output_projection",
    "head_weights": "trainable_point_weights",
}
"""transformers' (and OpenFold v1's) names to AlphaFold's; the layouts are the same."""


def esmfold_module(case: Case) -> Any:
    """`transformers`' EsmFold attention with the case's widths and weights."""
    from types import SimpleNamespace

    from transformers.models.esm.modeling_esmfold import EsmFoldInvariantPointAttention

    config = case.config
    module = EsmFoldInvariantPointAttention(
        SimpleNamespace(
            sequence_dim=config.num_channel,
            pairwise_dim=config.pair_channel,
            ipa_dim=config.num_scalar_qk,
            num_heads_ipa=config.num_head,
            num_qk_points=config.num_point_qk,
            num_v_points=config.num_point_v,
            epsilon=config.norm_epsilon,
            inf=1e5,
        )
    )
    module.load_state_dict({theirs: case.weights.to_torch()[ours] for theirs, ours in _esmfold_names(module).items()})
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
    by_name = {ours: by_parameter[theirs] for theirs, ours in _esmfold_names(module).items()}
    return _named(out, by_input, canonical_from_torch(by_name, case.config))


def _esmfold_names(module: Any) -> dict[str, str]:
    """Their parameter names to our torch ones."""
    names = (name.partition(".") for name, _ in module.named_parameters())
    return {f"{module}{dot}{leaf}": f"{ESMFOLD_NAMES[module]}{dot}{leaf}" for module, dot, leaf in names}


def run_lucidrains(case: Case) -> Arrays:
    """The PyPI package `invariant-point-attention`: row-vector frames, points with the coordinate innermost."""
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from invariant_point_attention import InvariantPointAttention

    c = config = case.config
    paired = config.pair_channel is not None
    module = InvariantPointAttention(
        dim=c.num_channel,
        heads=c.num_head,
        scalar_key_dim=c.num_scalar_qk,
        scalar_value_dim=c.num_scalar_v,
        point_key_dim=c.num_point_qk,
        point_value_dim=c.num_point_v,
        pairwise_repr_dim=c.pair_channel,
        require_pairwise_repr=paired,
        eps=c.norm_epsilon,
    )

    def coordinate_innermost(number: int) -> np.ndarray:
        rows = np.arange(c.num_head * 3 * number).reshape(c.num_head, 3, number)
        return rows.swapaxes(-1, -2).reshape(-1)

    columns = np.arange(c.num_feature)
    first, last = c.num_head * c.num_scalar_v, c.num_head * (c.num_scalar_v + 3 * c.num_point_v)
    columns[first:last] = columns[first:last].reshape(3, c.num_head, c.num_point_v).transpose(1, 2, 0).reshape(-1)
    rows = {
        "to_point_q.weight": coordinate_innermost(c.num_point_qk),
        "to_point_k.weight": coordinate_innermost(c.num_point_qk),
        "to_point_v.weight": coordinate_innermost(c.num_point_v),
    }
    names = {f"to_scalar_{x}.weight": f"{x}_scalar_projection.weight" for x in "qkv"}
    names |= {f"to_point_{x}.weight": f"{x}_point_projection.point_projection.weight" for x in "qkv"}
    names |= {f"to_out.{leaf}": f"output_projection.{leaf}" for leaf in ("weight", "bias")}
    names |= {"point_weights": "trainable_point_weights"}
    if paired:
        names |= {f"to_pairwise_attn_bias.0.{leaf}": f"attention_2d.{leaf}" for leaf in ("weight", "bias")}

    ours = case.weights.to_torch()
    state = {theirs: ours[name][rows.get(theirs, slice(None))] for theirs, name in names.items()}
    state["to_out.weight"] = state["to_out.weight"][:, columns]
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
    by_name = {}
    for theirs, name in names.items():
        x = by_name[name] = np.empty_like(by_parameter[theirs])
        if theirs == "to_out.weight":
            x[:, columns] = by_parameter[theirs]
        else:
            x[rows.get(theirs, slice(None))] = by_parameter[theirs]
    return _named(out, by_input, canonical_from_torch(by_name, config))


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
