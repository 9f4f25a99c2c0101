"""The tested functions: each loss on the fields of a problem, with either package's module as `losses`."""

from __future__ import annotations

from functools import partial


def true_backbone(x):
    return type(x.true_groups)(x.true_groups.rotation[..., 0, :, :], x.true_groups.translation[..., 0, :])


def last(frames):
    return type(frames)(frames.rotation[-1], frames.translation[-1])


def fape(losses, x, **options):
    frames, true = last(x.backbone), true_backbone(x)
    known = x.group_mask[..., 0]
    return losses.frame_aligned_point_error(
        frames, true, known, x.atom14[..., 4, :], x.true_atom14[..., 4, :], x.atom14_mask[..., 4], **options
    )


def fape_of_pairs(losses, x, **options):
    pair_mask = x.chain_id[..., :, None] != x.chain_id[..., None, :]
    return fape(losses, x, pair_mask=pair_mask, clamp_distance=30.0, length_scale=20.0, **options)


def backbone(losses, x, **options):
    return losses.backbone_loss(x.backbone, true_backbone(x), x.group_mask[..., 0], **options)


def renamed(losses, x, **options):
    return losses.rename_ambiguous_atoms(x.atom14, x.true_atom14, x.atom14_mask, x.aatype, **options)


def renamed_frames(losses, x):
    return losses.rename_ambiguous_frames(x.true_groups, x.aatype, x.mask)


def sidechain(losses, x, **options):
    return losses.sidechain_loss(
        x.groups, x.true_groups, x.group_mask, x.atom14, x.true_atom14, x.atom14_mask, **options
    )


def chi(losses, x):
    return losses.supervised_chi_loss(x.angles, x.true_chi, x.chi_mask, x.aatype)


def angle_norm(losses, x):
    return losses.angle_norm_loss(x.unnormalized, x.mask)


def bonds(losses, x, **options):
    return losses.between_residue_bond_loss(x.atom14, x.exists, x.residue_index, x.aatype, **options)


def clashes(losses, x, **options):
    return losses.between_residue_clash_loss(x.atom14, x.exists, x.residue_index, x.aatype, **options)


def within(losses, x):
    return losses.within_residue_violations(x.atom14, x.exists, x.aatype)


def violations(losses, x, chains=False, **options):
    chain_id = x.chain_id if chains else None
    found = losses.find_structural_violations(
        x.atom14, x.exists, x.residue_index, x.aatype, chain_id=chain_id, **options
    )
    metrics = losses.violation_metrics(found, x.atom14, x.exists, x.residue_index, x.mask, chain_id=chain_id)
    return found, losses.structural_violation_loss(found, x.exists), metrics


def lddt(losses, x):
    arrays = x.atom14[..., 1, :], x.true_atom14[..., 1, :], x.atom14_mask[..., 1]
    return losses.lddt(*arrays), losses.lddt(*arrays, per_residue=True), losses.lddt(*arrays, cutoff=8.0)


def plddt(losses, x, **options):
    arrays = x.logits, x.atom14[..., 1, :], x.true_atom14[..., 1, :], x.atom14_mask[..., 1]
    return losses.plddt_loss(*arrays, resolution=x.resolution, **options)


def total(losses, x, chains=False, **options):
    target = losses.StructureTarget(
        aatype=x.aatype,
        mask=x.mask,
        residue_index=x.residue_index,
        group_frames=x.true_groups,
        group_mask=x.group_mask,
        atom14=x.true_atom14,
        atom14_mask=x.atom14_mask,
        chi=x.true_chi,
        chi_mask=x.chi_mask,
        chain_id=x.chain_id if chains else None,
    )
    output = losses.StructureModuleOutput(
        rigids=x.backbone,
        frames=type(x.groups)(x.groups.rotation[None], x.groups.translation[None]),
        angles=x.angles,
        unnormalized_angles=x.unnormalized,
        atom14=x.atom14[None],
        act=x.angles,
    )
    return losses.structure_module_loss(output, target, **options)


def with_chains(function):
    return lambda losses, x: function(losses, x, chain_id=x.chain_id)


LOSSES = {
    "fape": fape,
    "fape clamped": partial(fape, clamp_distance=10.0, epsilon=1e-3, length_scale=7.0),
    "fape of pairs": fape_of_pairs,
    "backbone": backbone,
    "backbone half clamped": lambda losses, x: backbone(losses, x, use_clamped_fape=x.clamped),
    "backbone of chains": with_chains(backbone),
    "sidechain": sidechain,
    "renamed": renamed,
    "renamed frames": renamed_frames,
    "chi": chi,
    "angle norm": angle_norm,
    "bonds": bonds,
    "bonds of chains": with_chains(bonds),
    "clashes": clashes,
    "clashes of chains": with_chains(clashes),
    "within": within,
    "violations": violations,
    "violations of chains": partial(violations, chains=True),
    "lddt": lddt,
    "plddt": plddt,
    "total": total,
    "total of chains": partial(total, chains=True),
}

CHUNKED = {
    "fape": fape,
    "fape of pairs": fape_of_pairs,
    "backbone of chains": lambda losses, x, **options: backbone(losses, x, chain_id=x.chain_id, **options),
    "sidechain": sidechain,
    "renamed": renamed,
    "clashes": clashes,
    "clashes of chains": lambda losses, x, **options: clashes(losses, x, chain_id=x.chain_id, **options),
    "total of chains": partial(total, chains=True),
}
