"""AlphaFold's own losses on the same problems."""

from __future__ import annotations

import importlib
from functools import cache, partial

import numpy as np
import pytest
from loss_cases import (
    LOSSES,
    angle_norm,
    backbone,
    chi,
    fape,
    last,
    lddt,
    plddt,
    renamed,
    sidechain,
    total,
    true_backbone,
    violations,
)
from loss_problems import PREDICTED, Frames, gathered

from ipa_bridge.proteins import residues


@cache
def alphafold():
    """AlphaFold's modules by name."""
    pytest.importorskip("alphafold")
    pytest.importorskip("ml_collections")
    names = ("all_atom", "all_atom_multimer", "folding", "folding_multimer", "lddt", "modules", "config", "r3")
    modules = {name: importlib.import_module(f"alphafold.model.{name}") for name in names}
    modules["geometry"] = importlib.import_module("alphafold.model.geometry")
    return type("AlphaFold", (), modules)


def as_alphafold(function, p, dtype="float64"):
    """AlphaFold's loss on a problem, under the dtype promotion and x64 setting it was written for; cached."""
    key = function, id(p.mask), dtype
    if key not in ANSWERS:
        ANSWERS[key] = p, _as_alphafold(function, p, dtype)
    return ANSWERS[key][1]


ANSWERS = {}


def _as_alphafold(function, p, dtype):
    import jax

    def of_prediction(predicted):
        return function(p._replace(**predicted))

    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("standard"):
        return jax.tree.map(np.asarray, jax.jit(of_prediction)({name: getattr(p, name) for name in PREDICTED}))


def r3_rigids(frames):
    r3 = alphafold().r3
    rotation, translation = frames
    parts = [rotation[..., i, j] for i in range(3) for j in range(3)]
    return r3.Rigids(r3.Rots(*parts), r3.Vecs(*(translation[..., i] for i in range(3))))


def r3_vecs(x):
    return alphafold().r3.Vecs(*(x[..., i] for i in range(3)))


def rigid3(frames):
    geometry = alphafold().geometry
    return geometry.Rigid3Array.from_array4x4(to_4x4(frames))


def to_4x4(frames):
    import jax.numpy as jnp

    bottom = np.broadcast_to(np.array([0, 0, 0, 1], np.float32), (*frames.translation.shape[:-1], 1, 4))
    return jnp.concatenate([jnp.concatenate([frames.rotation, frames.translation[..., None]], -1), bottom], -2)


def to_tensor_7(frames):
    from ipa_jax import Rigid

    return Rigid(*frames).to_tensor_7()


def to_flat_12(frames):
    return np.concatenate([frames.rotation.reshape(*frames.rotation.shape[:-2], 9), frames.translation], -1)


def batch_of(p):
    """The problem as AlphaFold's batch."""
    dtype = p.atom14.dtype
    swap = residues.ATOM14_SWAP[p.aatype]
    turned = residues.GROUP_IS_AMBIGUOUS[p.aatype]
    rotation = np.where(turned[..., None, None], p.true_groups.rotation * np.array([1, -1, -1]), p.true_groups.rotation)
    alternative = Frames(rotation.astype(dtype), p.true_groups.translation)
    return {
        "aatype": p.aatype,
        "residue_index": p.residue_index,
        "seq_mask": p.mask.astype(dtype),
        "backbone_affine_tensor": to_tensor_7(true_backbone(p)),
        "backbone_affine_mask": p.group_mask[..., 0].astype(dtype),
        "rigidgroups_gt_frames": to_flat_12(p.true_groups),
        "rigidgroups_alt_gt_frames": to_flat_12(alternative),
        "rigidgroups_gt_exists": p.group_mask.astype(dtype),
        "atom14_gt_positions": p.true_atom14,
        "atom14_alt_gt_positions": gathered(p.true_atom14, swap),
        "atom14_atom_is_ambiguous": residues.ATOM14_IS_AMBIGUOUS[p.aatype].astype(dtype),
        "atom14_gt_exists": p.atom14_mask.astype(dtype),
        "atom14_alt_gt_exists": np.take_along_axis(p.atom14_mask, swap, -1).astype(dtype),
        "atom14_atom_exists": p.exists.astype(dtype),
        "residx_atom14_to_atom37": residues.ATOM14_TO_ATOM37[p.aatype],
        "chi_angles": np.arctan2(p.true_chi[..., 0], p.true_chi[..., 1]),
        "chi_mask": p.chi_mask.astype(dtype),
    }


def value_of(p):
    """The prediction as AlphaFold's output."""
    layered = Frames(*(x[None] for x in p.groups))
    return {
        "traj": to_tensor_7(p.backbone),
        "sidechains": {
            "frames": r3_rigids(layered),
            "atom_pos": r3_vecs(p.atom14[None]),
            "angles_sin_cos": p.angles,
            "unnormalized_angles_sin_cos": p.unnormalized,
        },
        "final_atom14_positions": p.atom14,
    }


def head_config(name="structure_module", multimer=False):
    config = alphafold().config
    return (config.CONFIG_MULTIMER if multimer else config.CONFIG).model.heads[name]


def flat_violations(found):
    """Violations, ours or AlphaFold's, in a fixed order."""
    b, w = found["between_residues"], found["within_residues"]
    return [
        *(b[f"{name}_loss_mean"] for name in ("bonds_c_n", "angles_ca_c_n", "angles_c_n_ca")),
        b["connections_per_residue_loss_sum"],
        b["connections_per_residue_violation_mask"],
        b["clashes_mean_loss"],
        b["clashes_per_atom_loss_sum"],
        b["clashes_per_atom_clash_mask"],
        w["per_atom_loss_sum"],
        w["per_atom_violations"],
        found["total_per_residue_violations_mask"],
    ]


METRICS = ("extreme_ca_ca_distance", "between_residue_bond", "between_residue_clash", "within_residue", "per_residue")


def alphafold_fape(p, clamp=None):
    module, true = alphafold().all_atom, true_backbone(p)
    return [
        module.frame_aligned_point_error(
            r3_rigids(last(p.backbone)),
            r3_rigids(true),
            p.group_mask[..., 0].astype(p.atom14.dtype),
            r3_vecs(p.atom14[..., 4, :]),
            r3_vecs(p.true_atom14[..., 4, :]),
            p.atom14_mask[..., 4].astype(p.atom14.dtype),
            length_scale=10.0 if clamp is None else 7.0,
            l1_clamp_distance=clamp,
            epsilon=1e-4 if clamp is None else 1e-3,
        )
    ]


def alphafold_backbone(p, **batch):
    ret = {"loss": 0.0}
    alphafold().folding.backbone_loss(ret, batch_of(p) | batch, value_of(p), head_config())
    return [ret["loss"], ret["fape"]]


def alphafold_renamed(p):
    found = alphafold().folding.compute_renamed_ground_truth(batch_of(p), p.atom14)
    return [found[f"renamed_atom14_gt_{name}"] for name in ("positions", "exists")] + [found["alt_naming_is_better"]]


def alphafold_sidechain(p):
    given = {
        "alt_naming_is_better": np.zeros(p.mask.shape, p.atom14.dtype),
        "renamed_atom14_gt_positions": p.true_atom14,
        "renamed_atom14_gt_exists": p.atom14_mask.astype(p.atom14.dtype),
    }
    return [alphafold().folding.sidechain_loss(batch_of(p), value_of(p) | given, head_config())["loss"]]


def alphafold_angles(p, name):
    ret = {"loss": 0.0}
    alphafold().folding.supervised_chi_loss(ret, batch_of(p), value_of(p), head_config())
    return [ret[name]]


def alphafold_violations(p):
    module, batch = alphafold().folding, batch_of(p)
    found = module.find_structural_violations(batch, p.atom14, head_config())
    ret = {"loss": 0.0}
    module.structural_violation_loss(ret, batch, {"violations": found}, head_config())
    metrics = module.compute_violation_metrics(batch, p.atom14, found)
    return [*flat_violations(found), ret["loss"], *(metrics[f"violations_{name}"] for name in METRICS)]


def alphafold_violations_of_chains(p):
    module, geometry, dtype = alphafold().folding_multimer, alphafold().geometry, p.atom14.dtype
    positions, exists = geometry.Vec3Array.from_array(p.atom14), p.exists.astype(dtype)
    config = head_config(multimer=True)
    found = module.find_structural_violations(p.aatype, p.residue_index, exists, positions, config, p.chain_id)
    loss = module.structural_violation_loss(exists, found, config)
    metrics = module.compute_violation_metrics(p.residue_index, exists, p.mask.astype(dtype), positions, found)
    return [*flat_violations(found), loss, *(metrics[f"violations_{name}"] for name in METRICS)]


def alphafold_lddt(p):
    arrays = p.atom14[None, :, 1], p.true_atom14[None, :, 1], p.atom14_mask[None, :, 1:2].astype(p.atom14.dtype)
    module = alphafold().lddt
    return [
        x[0] for x in (module.lddt(*arrays), module.lddt(*arrays, per_residue=True), module.lddt(*arrays, cutoff=8.0))
    ]


def alphafold_plddt(p):
    import haiku as hk
    import jax.numpy as jnp

    def in_atom37(x):  # both read Cα only, the second atom
        return jnp.pad(x, [(0, 0), (0, 23), *[(0, 0)] * (x.ndim - 2)])

    batch = {
        "all_atom_positions": in_atom37(p.true_atom14),
        "all_atom_mask": in_atom37(p.atom14_mask),
        "resolution": p.resolution,
    }
    value = {
        "structure_module": {"final_atom_positions": in_atom37(p.atom14)},
        "predicted_lddt": {"logits": p.logits},
    }

    def loss():
        head = alphafold().modules.PredictedLDDTHead(head_config("predicted_lddt"), None)
        return head.loss(value, batch)["loss"]

    return [hk.transform(loss).apply({}, None)]


def alphafold_total(p, gradient=False):
    import haiku as hk
    import jax

    def loss(atom14, rotation, translation, angles, unnormalized):
        value = value_of(p._replace(atom14=atom14, groups=Frames(rotation, translation)))
        value["sidechains"] |= {"angles_sin_cos": angles, "unnormalized_angles_sin_cos": unnormalized}

        def of_module():
            return alphafold().folding.StructureModule(head_config(), None).loss(value, batch_of(p))

        ret = hk.transform(of_module).apply({}, None)
        return ret["loss"], [ret[name] for name in ("fape", "sidechain_fape", "chi_loss", "angle_norm_loss")]

    arrays = (p.atom14, *p.groups, p.angles, p.unnormalized)
    if gradient:
        return jax.grad(loss, tuple(range(5)), has_aux=True)(*arrays)[0]
    value, terms = loss(*arrays)
    return [value, *terms]


def ours_total(losses, x):
    loss = total(losses, x)
    return loss.loss, loss.fape, loss.sidechain_fape, loss.chi, loss.angle_norm


MONOMER = {
    "fape": (fape, alphafold_fape),
    "fape clamped": (LOSSES["fape clamped"], partial(alphafold_fape, clamp=10.0)),
    "backbone": (backbone, alphafold_backbone),
    "backbone half clamped": (
        partial(backbone, use_clamped_fape=0.3),
        partial(alphafold_backbone, use_clamped_fape=np.float64(0.3)),
    ),
    "sidechain": (sidechain, alphafold_sidechain),
    "renamed": (renamed, alphafold_renamed),
    "chi": (chi, partial(alphafold_angles, name="chi_loss")),
    "angle norm": (angle_norm, partial(alphafold_angles, name="angle_norm_loss")),
    "violations": (violations, alphafold_violations),
    "lddt": (lddt, alphafold_lddt),
    "plddt": (plddt, alphafold_plddt),
    "total": (ours_total, alphafold_total),
}

ROUNDED = {"chi": 1e-11, "plddt": 1e-8, "violations": 1e-6, "total": 1e-6, "backbone half clamped": 1e-6}
"""Values that AlphaFold always holds in float32: masks and their epsilon, bounds within residues, the clamped share."""
