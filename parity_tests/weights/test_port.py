"""The command ipa-port, run as a person would: conversions, reports, and refused losses."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from port_cases import ALPHAFOLD, ONE_WIDTH, SMALL_MODULE, run

from ipa_bridge.config import IPABlockConfig, IPATransformerConfig
from ipa_bridge.weights import Weights, porting
from ipa_parity.attention.cases import ODD, ODD_DOWN_Z, ODD_MULTIMER, ODD_NO_BIAS

pytestmark = pytest.mark.usefixtures("torch")


def test_there_and_back_through_openfold(alphafold, tmp_path, capsys):
    there, back = tmp_path / "openfold.pt", tmp_path / "back.npz"
    code, out, _ = run(capsys, "convert", alphafold, there, "--to", "openfold", "--verify")
    assert code == 0
    assert f"structure module of AlphaFold at {ALPHAFOLD}/structure_module" in out
    assert "45 parameters for OpenFold 2" in out
    assert f"10 arrays of other parts of the model: {ALPHAFOLD}/evoformer (2), {ALPHAFOLD}/predicted_lddt" in out
    assert "the same function" in out
    code, out, _ = run(
        capsys, "convert", there, back, "--to", "alphafold", "--to-root", f"{ALPHAFOLD}/structure_module"
    )
    assert code == 0
    with np.load(alphafold) as before, np.load(back) as after:
        assert set(after.files) == {name for name in before.files if "structure_module" in name}
        assert all(after[name].tobytes() == before[name].tobytes() for name in after.files)
    code, out, _ = run(capsys, "compare", alphafold, there)
    assert (code, out.splitlines()[-1]) == (0, "the same function: 45 parameters, number for number")


def test_json_holds_everything(alphafold, tmp_path, capsys):
    code, out, _ = run(capsys, "convert", alphafold, tmp_path / "e.pt", "--to", "esmfold", "--verify", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["source"] == {
        "file": str(alphafold),
        "dialect": "alphafold",
        "root": f"{ALPHAFOLD}/structure_module",
    }
    assert report["converted"] + sum(report["elsewhere"].values()) == len(np.load(alphafold).files)
    assert (report["notes"], report["assumed"], report["added"]) == ([], [], [])
    assert (report["losses"], report["verified"]["passed"]) == ([], True)
    assert report["verified"]["eps"] < 100
    code, out, _ = run(capsys, "inspect", alphafold, "--json")
    report = json.loads(out)
    assert (code, report["dialect"], report["module"]) == (0, "alphafold", "structure module")
    assert report["config"]["ipa"]["num_head"] == ODD.num_head
    assert len(report["parameters"]) == 45
    first = report["parameters"][0]
    expected = np.linalg.norm(np.load(alphafold)[f"{ALPHAFOLD}/structure_module/single_layer_norm//scale"])
    assert (first["name"], first["dtype"]) == ("single_layer_norm/scale", "float32")
    assert first["norm"] == pytest.approx(expected, rel=1e-6)
    assert {x["module"] for x in report["modules"]} == {
        "structure module",
        "invariant point attention",
        "confidence head",
    }


def test_inspect_lists_what_a_file_holds(alphafold, tmp_path, capsys, torch):
    code, out, _ = run(capsys, "inspect", alphafold)
    assert code == 0
    for line in ("structure module of AlphaFold at", "num_layer = 8", f"  {ALPHAFOLD}/evoformer: 2 arrays"):
        assert line in out
    state = Weights.random(ONE_WIDTH).to_torch(dialect="openfold_v1")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "ipa.pt")
    code, out, _ = run(capsys, "inspect", tmp_path / "ipa.pt")
    assert code == 0
    assert "invariant point attention at state_dict: openfold_v1 or esmfold" in out
    assert "  norm_epsilon = 1e-08 (assumed)" in out
    code, out, _ = run(capsys, "inspect", tmp_path / "ipa.pt", "--dialect", "esmfold")
    assert code == 0
    assert "(assumed)" not in out
    assert "not arrays with names: epoch" in out
    assert "linear_kv_points.weight" in out
    Weights.random(ODD_NO_BIAS).save(tmp_path / "ours.npz")
    assert "invariant point attention of IPA Twins in Haiku" in run(capsys, "inspect", tmp_path / "ours.npz")[1]


def test_losses_are_allowed_by_name_or_refused(tmp_path, capsys):
    source, destination = tmp_path / "m.safetensors", tmp_path / "l.pt"
    Weights.random(ODD_MULTIMER).save(source)
    code, out, err = run(capsys, "convert", source, destination, "--to", "lucidrains")
    assert (code, out, destination.exists()) == (2, "", False)
    assert "--allow-lossy point_bias,norm" in err
    code, out, _ = run(
        capsys, "convert", source, destination, "--to", "lucidrains", "--allow-lossy", "point_bias,norm", "--verify"
    )
    assert code == 0
    assert "lost, as allowed: point_bias: the target has no place for non-zero biases of the point projections" in out
    assert "its `rotations` are the transpose of ours" in out
    assert "verified on random input: the same function, within" in out
    assert "except that losses and rounding change outputs by" in out
    code, out, _ = run(capsys, "compare", source, destination)
    assert code == 1
    assert "norm_form differs: 'clamp' and 'add'" in out
    assert "q_point_local/bias differs by" in out


def test_down_z_can_be_merged(tmp_path, capsys):
    config = replace(ODD_DOWN_Z, num_scalar_v=ODD.num_scalar_qk, pair_channel=8, pair_value_channel=2)
    source = tmp_path / "f.pt"
    torch = pytest.importorskip("torch")
    torch.save(
        {
            f"trunk.ipa_{b}.{name}": x
            for b in range(2)
            for name, x in Weights.random(config, seed=b).to_torch(dialect="framediff").items()
        },
        source,
    )
    assert "2 invariant point attentions" in run(capsys, "convert", source, tmp_path / "o.npz")[2]
    choice = ("--root", "trunk.ipa_1", "--to", "openfold", "--allow-lossy", "down_z", "--verify", "--json")
    code, out, _ = run(capsys, "convert", source, tmp_path / "o.pt", *choice)
    report = json.loads(out)
    assert (code, report["verified"]["passed"]) == (0, True)
    assert sum(report["elsewhere"].values()) == len(Weights.random(config).to_torch(dialect="framediff"))
    ignored = "linear_rbf.weight, linear_rbf.bias at trunk.ipa_1: ignored, since FrameDiff never reads them"
    assert (report["notes"][0], report["added"]) == (ignored, [])
    _, out, _ = run(capsys, "inspect", source, "--root", "trunk.ipa_1")
    assert f"note: {ignored}" in out
    Weights.random(config).save(tmp_path / "ours.safetensors")
    code, out, _ = run(capsys, "convert", tmp_path / "ours.safetensors", tmp_path / "g.pt", "--to", "framediff")
    zeros = "added as zeros, since FrameDiff expects but never reads them: linear_rbf.weight, linear_rbf.bias"
    assert (code, zeros in out) == (0, True)


def test_dtype_rounds_and_verify_prints_the_error(tmp_path, capsys):
    Weights.random(ODD).save(tmp_path / "a.npz")
    code, out, _ = run(
        capsys, "convert", tmp_path / "a.npz", tmp_path / "b.safetensors", "--dtype", "bfloat16", "--verify", "--json"
    )
    verified = json.loads(out)["verified"]
    assert (code, verified["passed"]) == (0, True)
    assert 1e-4 < verified["change"] < 0.1
    assert Weights.load(tmp_path / "b.safetensors").arrays["q_scalar/weights"].dtype.name == "bfloat16"
    code, _, err = run(capsys, "convert", tmp_path / "b.safetensors", tmp_path / "c.npz")
    assert code == 2
    assert "cast to float32" in err


@pytest.mark.parametrize("options", [[], ["--dtype", "bfloat16"], ["--to", "openfold", "--allow-lossy", "down_z"]])
@pytest.mark.parametrize("zeros", [False, True])
def test_a_conversion_that_fails_verification_writes_nothing(tmp_path, capsys, monkeypatch, options, zeros):
    """Half precision, an allowed loss or an untrained output projection do not hide a wrong conversion."""
    config = replace(ODD_DOWN_Z, num_scalar_v=ODD.num_scalar_qk, position_scale=1.0)
    weights = Weights.random(config)
    if zeros:
        untrained = {name: 0 * x if name.startswith("output_") else x for name, x in weights.arrays.items()}
        weights = replace(weights, arrays=untrained)
    weights.save(tmp_path / "a.safetensors")
    real = porting.in_dialect

    def damaged(*of):
        arrays = real(*of)
        return {
            x: y[::-1].copy() if x.endswith(("q_scalar.weight", "linear_q.weight")) else y for x, y in arrays.items()
        }

    assert run(capsys, "convert", tmp_path / "a.safetensors", tmp_path / "b.bin", "--verify", *options)[0] == 0
    monkeypatch.setattr(porting, "in_dialect", damaged)
    code, out, _ = run(capsys, "convert", tmp_path / "a.safetensors", tmp_path / "c.pt", "--verify", *options)
    assert code == 1
    assert "NOT THE SAME FUNCTION" in out
    assert "nothing was written" in out
    assert not (tmp_path / "c.pt").exists()


@pytest.mark.parametrize("damaged", ["q_scalar.weight", "linear_q.weight"])
def test_either_half_of_a_conversion_is_verified(tmp_path, capsys, monkeypatch, damaged):
    """The source's names and the target's: a mistake in one of them alone is seen."""
    Weights.random(ONE_WIDTH).save(tmp_path / "a.safetensors")
    real = porting.in_dialect

    def half_damaged(*of):
        return {name: x[::-1].copy() if name == damaged else x for name, x in real(*of).items()}

    monkeypatch.setattr(porting, "in_dialect", half_damaged)
    convert = ("convert", tmp_path / "a.safetensors", tmp_path / "b.pt", "--to", "openfold", "--verify")
    code, out, _ = run(capsys, *convert)
    assert (code, "NOT THE SAME FUNCTION" in out, (tmp_path / "b.pt").exists()) == (1, True, False)


def test_overflow_is_not_verified(tmp_path, capsys):
    weights = Weights.random(ODD, dtype=np.float64)
    replace(weights, arrays={name: x * 1e200 for name, x in weights.arrays.items()}).save(tmp_path / "a.npz")
    with np.errstate(all="ignore"):
        code, out, _ = run(capsys, "convert", tmp_path / "a.npz", tmp_path / "b.pt", "--verify")
    assert code == 1
    assert "NOT VERIFIED" in out


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_what_the_default_target_cannot_store_is_reported(tmp_path, capsys, suffix):
    """After a conversion, `compare` finds no difference, or the command says which config to pass when reading."""
    source, destination = tmp_path / "esm.pt", tmp_path / f"ours{suffix}"
    config = IPATransformerConfig.lucidrains(6, depth=1, heads=2, original_composition_order=True)
    torch = pytest.importorskip("torch")
    torch.save(Weights.random(config).to_torch(dialect="lucidrains"), source)
    code, out, _ = run(capsys, "convert", source, destination)
    assert code == 0
    same = run(capsys, "compare", source, destination)[0] == 0
    assert same == (suffix == ".safetensors")
    assert same or "cannot store original_composition_order=True (Weights.load will assume False)" in out


def test_assumed_fields_are_reported(tmp_path, capsys, torch):
    """A .pt file holds no config, so a block's post_norm is assumed; .safetensors marks it as assumed."""
    source, marked, told = (tmp_path / f"{x}" for x in ("a.pt", "b.safetensors", "c.safetensors"))
    config = IPABlockConfig(ipa=ODD_NO_BIAS)
    torch.save(Weights.random(config).to_torch(), source)
    Weights.random(config).save(told)
    code, out, _ = run(capsys, "convert", source, marked)
    assert code == 0
    assert "note: assumed, because neither names nor shapes determine them: " in out
    assert "post_norm=True; when you load these weights, pass the true values, as in config=IPABlockConfig(" in out
    for path in (source, marked):
        code, out, _ = run(capsys, "inspect", path)
        lines = out.splitlines()
        assert code == 0
        assert "  post_norm = True (assumed)" in lines
        assert "  ipa.num_head = 3" in lines
        report = json.loads(run(capsys, "inspect", path, "--json")[1])
        assert {"post_norm", "ipa.norm_epsilon", "ipa.norm_form", "ipa.position_scale"} <= set(report["assumed"])
        assert "ipa.num_head" not in report["assumed"]
    assert "(assumed)" not in run(capsys, "inspect", told)[1]
    report = json.loads(run(capsys, "convert", source, marked, "--force", "--json")[1])
    assert set(report["assumed"]) == set(Weights.load(marked).assumed)


def test_modules_beside_an_attentions_own_are_skipped(tmp_path, capsys, torch):
    state = Weights.random(ONE_WIDTH).to_torch(dialect="openfold_v1", root="layers.0")
    torch.save(state | {"layers.0.norm.0.weight": torch.ones(3)}, tmp_path / "l.pt")
    code, out, _ = run(capsys, "convert", tmp_path / "l.pt", tmp_path / "ours.npz")
    assert code == 0
    assert "note: norm at layers.0, beside the parameters of the attention: ignored, as other parts of the model" in out
    assert "not converted, 1 arrays of other parts of the model: layers.0.norm (1)" in out


def test_metadata_reaches_the_module_within(tmp_path, capsys):
    config = replace(SMALL_MODULE, ipa=replace(ONE_WIDTH, norm_epsilon=1e-5))
    Weights.random(config).save(tmp_path / "a.safetensors")
    within = "fold_iteration.invariant_point_attention"
    assert Weights.load(tmp_path / "a.safetensors", root=within).config.norm_epsilon == 1e-5
