"""The losses' numbers are AlphaFold's."""

from __future__ import annotations

from alphafolds_losses import head_config

from ipa_bridge.config import LossConfig


def test_the_numbers_are_alphafolds():
    module, multimer, confidence = head_config(), head_config(multimer=True), head_config("predicted_lddt")
    theirs = {
        "sidechain_weight": module.sidechain.weight_frac,
        "chi_weight": module.chi_weight,
        "angle_norm_weight": module.angle_norm_weight,
        "violation_weight": module.structural_violation_loss_weight,
        "clamp_distance": module.fape.clamp_distance,
        "length_scale": module.fape.loss_unit_distance,
        "interface_clamp_distance": multimer.interface_fape.atom_clamp_distance,
        "interface_length_scale": multimer.interface_fape.loss_unit_distance,
        "tolerance_factor": module.violation_tolerance_factor,
        "overlap_tolerance": module.clash_overlap_tolerance,
        "min_resolution": confidence.min_resolution,
        "max_resolution": confidence.max_resolution,
    }
    assert {name: getattr(LossConfig(), name) for name in theirs} == theirs
    assert module.sidechain.atom_clamp_distance == LossConfig().clamp_distance
    assert module.sidechain.length_scale == LossConfig().length_scale
