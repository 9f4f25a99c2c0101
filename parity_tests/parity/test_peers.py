"""Published implementations agree with ours, given the same parameters: outputs, and gradients to everything."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ipa_bridge.config import IPAConfig
from ipa_bridge.proteins import load_structure
from ipa_bridge.proteins.frames import idealised_peptide
from ipa_parity import peers
from ipa_parity.attention.cases import Case, make_case
from ipa_parity.attention.stages import RUNNERS, run_oracle
from ipa_parity.frameworks import installed_frameworks
from ipa_parity.report import compare

PEERS = {
    "alphafold monomer": ("alphafold", peers.run_alphafold, IPAConfig.alphafold2(), ("float32", "float64")),
    "alphafold multimer": ("alphafold", peers.run_alphafold, IPAConfig.alphafold_multimer(), ("float32",)),
    "esmfold": ("transformers", peers.run_esmfold, IPAConfig.esmfold(), ("float32",)),
    "lucidrains": (
        "invariant_point_attention",
        peers.run_lucidrains,
        IPAConfig.lucidrains(64, point_value_dim=3, pairwise_repr_dim=32),
        ("float32", "float64"),
    ),
    "lucidrains without pair": (
        "invariant_point_attention",
        peers.run_lucidrains,
        IPAConfig.lucidrains(64, require_pairwise_repr=False),
        ("float32", "float64"),
    ),
}


@pytest.mark.covering
@pytest.mark.parametrize("protein", ["random frames", "peptide", "1gcn.pdb", "2rbg.pdb"])
@pytest.mark.parametrize(("peer", "dtype"), [(name, dtype) for name, x in PEERS.items() for dtype in x[3]])
def test_a_published_implementation_agrees(peer, dtype, protein, request, compared_with_peers):
    package, run, config, _ = PEERS[peer]
    pytest.importorskip(package)
    if len(installed_frameworks()) < 2:
        pytest.skip("both frameworks are held against it, and one of them is not installed")
    case = make_case(peer, config, (33,), structure=structure_of(protein, request))
    case = replace(case, cotangent=case.cotangent * case.mask[..., None]).astype(dtype)
    theirs = run(case)
    for framework, run_ours in RUNNERS.items():
        assert_agreement(case, dtype, framework, theirs, run_ours(case), compared_with_peers)
    row = judge(case, dtype, "out", "oracle", theirs["out"], run_oracle(case)["out"])
    assert row.passed, str(row)


@pytest.mark.parametrize("paired", [True, False])
def test_the_packages_own_example(paired):
    """The example of its README: width 64, 8 heads, 256 residues with identity frames, with and without pairs."""
    pytest.importorskip("invariant_point_attention")
    options = {"heads": 8, "scalar_key_dim": 16, "scalar_value_dim": 16, "point_key_dim": 4, "point_value_dim": 4}
    config = IPAConfig.lucidrains(64, require_pairwise_repr=paired, **options)
    case = make_case("its README", config, (1, 256))
    at_origin = {"rotation": np.broadcast_to(np.eye(3), (1, 256, 3, 3)), "translation": np.zeros((1, 256, 3))}
    everyone = np.ones((1, 256), bool)
    case = replace(case, mask=everyone, **at_origin).astype("float32")
    theirs = peers.run_lucidrains(case)["out"]
    for framework, run_ours in RUNNERS.items():
        row = judge(case, "float32", "out", framework, theirs, run_ours(case, gradients=False)["out"])
        assert row.passed, str(row)


def structure_of(protein: str, request: pytest.FixtureRequest):
    if protein == "random frames":
        return None
    if protein == "peptide":
        return idealised_peptide()
    structure = load_structure(request.getfixturevalue("structures_dir") / protein)
    fields = ("rotation", "translation", "mask", "aatype", "chain_id", "residue_number", "insertion_code")
    return replace(structure, **{field: getattr(structure, field)[:120] for field in fields})


def assert_agreement(case: Case, dtype: str, framework: str, theirs: dict, ours: dict, compared: list) -> None:
    bias = "gradient/attention_2d/bias"
    scale_of_bias = None
    if case.pair is not None:
        # Exactly zero in ours; in theirs a sum over all pairs that cancels except for rounding.
        assert (ours[bias] == 0).all()
        scale_of_bias = np.abs(theirs["gradient/attention_2d/weights"]).max() / np.abs(case.pair).max()
    rows = [
        judge(case, dtype, stage, framework, x, ours[stage], scale=scale_of_bias if stage == bias else None)
        for stage, x in theirs.items()
    ]
    assert {row.stage for row in rows} == {stage for stage in ours if stage.startswith(("out", "gradient/"))}
    compared += rows
    failures = [str(row) for row in rows if not row.passed]
    assert not failures, "\n".join(failures)


def judge(case, dtype, stage, reference, actual, expected, scale=None):
    meaningful = np.broadcast_to(case.mask[..., None], expected.shape) if stage == "out" else None
    return compare(
        actual,
        expected,
        case=case.name,
        stage=stage,
        dtype=dtype,
        subject="peer",
        reference=reference,
        meaningful=meaningful,
        scale=scale,
    )
