"""The structure module's gradients, and negative controls: different functions that must be detected."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from frameworks import Jax, Torch, one_of
from structure_module_cases import (
    CONFIGS,
    odd_case,
    start_of,
)

from ipa_bridge import tolerance
from ipa_bridge.kinds import parameter_shapes
from ipa_bridge.proteins import residues
from ipa_bridge.weights import Weights
from ipa_parity.structure_module.cases import PRESETS, make_case
from ipa_parity.structure_module.judge import compare_stage
from ipa_parity.structure_module.stages import named_layers


def started(case):
    """A case and its start frames."""
    return case, start_of(case)


# Gradients.


def hard_case(kind):
    case = odd_case("odd", "float32")
    nothing = np.zeros_like(case.atom37_mask)
    if kind == "all masked":
        return replace(case, mask=np.zeros_like(case.mask), atom37_mask=nothing)
    if kind == "glycine and alanine":
        aatype = np.where(np.arange(len(case.aatype)) % 2, residues.RESTYPES.index("G"), residues.RESTYPES.index("A"))
        return replace(case, aatype=aatype, atom37_mask=case.atom37_mask & residues.ATOM37_MASK[aatype])
    if kind == "unknown residues":
        aatype = np.full_like(case.aatype, 20)
        return replace(case, aatype=aatype, atom37_mask=case.atom37_mask & residues.ATOM37_MASK[aatype])
    if kind == "no side chains":
        return replace(case, atom37_mask=case.atom37_mask & (np.arange(37) < 3))
    if kind == "coincident atoms":
        return replace(case, atom37=np.zeros_like(case.atom37))
    if kind == "nothing resolved":
        return replace(case, atom37_mask=nothing)
    zeroed = {name: x * (not name.endswith("unnormalized_angles/weights")) for name, x in case.weights.arrays.items()}
    return replace(case, weights=Weights(zeroed, case.config))


@pytest.mark.parametrize(
    "kind",
    [
        "all masked",
        "glycine and alanine",
        "unknown residues",
        "no side chains",
        "coincident atoms",
        "nothing resolved",
        "no torsion vectors",
    ],
)
def test_hard_cases_have_finite_gradients(framework, kind):
    loss, gradients = framework.loss_and_gradients(*started(hard_case(kind)))
    assert np.isfinite(loss)
    assert all(np.isfinite(x).all() for x in gradients.values())


@pytest.mark.parametrize(
    "name",
    ["odd multimer", *(pytest.param(x, marks=pytest.mark.exhaustive) for x in ("odd", "concatenated", "alphafold2"))],
)
def test_the_frameworks_agree_on_the_whole_losss_gradients(name):
    """Gradients to representations, start frames and every parameter agree; the multimer case has several chains."""
    case = odd_case(name) if name in CONFIGS else make_case(name, PRESETS[name]())
    if name == "odd multimer":
        case = replace(case, chain_id=(np.arange(len(case.mask)) > 20).astype(np.int64))
    (one, ours), (other, theirs) = (one_of(x).loss_and_gradients(*started(case)) for x in (Jax, Torch))
    assert one == pytest.approx(other, rel=1e-12)
    assert set(ours) == set(theirs) == {"single", "pair", "rotation", "translation", *parameter_shapes(case.config)}
    for stage, x in theirs.items():
        scale = np.abs(theirs[stage.replace("attention_2d/bias", "attention_2d/weights")]).max()
        assert scale > 0
        assert np.abs(ours[stage] - x).max() <= 1e-10 * scale, stage


def test_rotations_pass_no_gradient_between_layers(framework):
    """With one layer, start rotations get a gradient through the atoms; with two, the second layer adds none."""
    case = odd_case()
    one = replace(case, weights=Weights(case.weights.arrays, replace(case.config, num_layer=1)))
    gradients = {name: rotation_gradient(framework, x) for name, x in (("one", one), ("three", case))}
    assert all(np.isfinite(x).all() and np.abs(x).max() > 1e-6 for x in gradients.values())
    free = rotation_gradient(framework, case, patched=True)
    assert np.abs(free - gradients["three"]).max() > 1e-3 * np.abs(free).max()
    undetached = Weights(case.weights.arrays, replace(case.config, detach_rotations=False))
    np.testing.assert_array_equal(rotation_gradient(framework, replace(case, weights=undetached)), free)


def rotation_gradient(framework, case, patched=False):
    """Gradient of all layers' atoms to the start rotations; if patched, without the stops between layers."""
    rigid = framework.package.Rigid
    with pytest.MonkeyPatch.context() as patch:
        if patched:
            patch.setattr(rigid, "stop_rotation_gradient", lambda self: self)
        single, pair, aatype, mask, rigids = framework.arguments(case, start_of(case), None)[-6:-1]
        cotangent = framework.array(case.cotangents["atom14"][: case.config.num_layer])
        if isinstance(framework, Torch):
            rigids.rotation.requires_grad_()
            output = framework.structure_module(case)(single, pair, aatype, mask, rigids=rigids)
            return framework.torch.autograd.grad((output.atom14 * cotangent).sum(), rigids.rotation)[0].numpy()
        apply = framework.package.transform_structure_module(case.config).apply
        params = case.weights.to_haiku()

        def scalar(rotation):
            start = rigid(rotation, rigids.translation)
            return (apply(params, None, single, pair, aatype, mask, rigids=start).atom14 * cotangent).sum()

        return np.asarray(framework.jax.jit(framework.jax.grad(scalar))(rigids.rotation))


# Negative controls: different functions that must be detected.


def chi_turned_the_other_way(module, side_chains, patch):
    honest = side_chains.torsion_angles_to_frames
    patch.setattr(
        "ipa_torch.structure_module.torsion_angles_to_frames",
        lambda rigids, angles, *rest, **named: honest(rigids, angles * angles.new_tensor([-1.0, 1.0]), *rest, **named),
    )


def updates_composed_from_the_left(module, side_chains, patch):
    rigid = side_chains.Rigid
    honest = rigid.compose
    patch.setattr(rigid, "compose", lambda self, other: honest(other, self))


def frames_in_a_thousandth_larger_a_unit(module, side_chains, patch):
    larger = replace(module.config, position_scale=1.001 * module.config.position_scale)
    patch.setattr(module, "config", larger)


def the_first_transition_left_out(module, side_chains, patch):
    from ipa_torch import structure_module

    patch.setattr(structure_module, "transition", lambda act, layers: 0 * act)


def side_chains_that_forget_the_first_activations(module, side_chains, patch):
    honest = module.fold_iteration.rigid_sidechain.forward
    patch.setattr(module.fold_iteration.rigid_sidechain, "forward", lambda act, initial: honest(act, act))


def a_bond_a_thousandth_longer(module, side_chains, patch):
    other = side_chains.residues.GROUP_TRANSLATION.copy()
    other[:, 5] *= 1.001
    patch.setattr(side_chains.residues, "GROUP_TRANSLATION", other)


CONTROLS = (
    chi_turned_the_other_way,
    updates_composed_from_the_left,
    frames_in_a_thousandth_larger_a_unit,
    the_first_transition_left_out,
    side_chains_that_forget_the_first_activations,
    a_bond_a_thousandth_longer,
)


@pytest.mark.covering
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.__name__)
def test_controls_are_caught(control, dtype):
    framework, case = one_of(Torch), odd_case("odd", dtype)
    from ipa_torch import side_chains

    expected = framework.run_structure_module(
        odd_case("odd", "float64") if dtype == "float64" else case.astype("float64")
    )
    module = framework.structure_module(case)
    inputs = framework.arguments(case, None, None)[:4]

    def caught():
        with framework.torch.no_grad():
            output = module(*inputs)
        arrays = named_layers(framework.torch.utils._pytree.tree_map(lambda x: x.numpy(), output))
        rows = [compare_stage(case, dtype, stage, "torch", arrays, "float64", expected) for stage in expected]
        return {row.stage for row in rows if not row.passed}

    assert not caught()
    with pytest.MonkeyPatch.context() as patch:
        control(module, side_chains, patch)
        assert "atom14/layer 3" in caught()


def test_what_is_forgiven_goes_by_the_lengths_of_torsion_vectors():
    """Where all are alike, rotations of groups may err twice what the table says, and not a tenth more."""
    case, (stage, lengths) = odd_case(), ("group_rotation/layer 1", "unnormalized_angles/layer 1")
    exact = {stage: np.ones((5, 8, 3, 3)), lengths: np.ones((5, 7, 2))}
    allowed = 2 * tolerance.bound(stage, "float64") * tolerance.epsilon("float64")
    rows = [
        compare_stage(case, "float64", stage, "one", {stage: exact[stage] + x * allowed}, "other", exact)
        for x in (0.9, 1.1)
    ]
    assert [row.passed for row in rows] == [True, False]
