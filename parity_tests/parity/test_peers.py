"""Published implementations are judged right: outputs, and gradients to everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest

from ipa_bridge.config import IPAConfig
from ipa_bridge.proteins import load_structure
from ipa_bridge.proteins.frames import idealised_peptide
from ipa_parity import check, peers
from ipa_parity.attention.cases import make_case
from ipa_parity.attention.stages import RUNNERS
from ipa_parity.report import compare


def alphafold(config: IPAConfig) -> Any:
    hk = pytest.importorskip("haiku")
    forward = peers.alphafold_forward(config)
    return hk.transform(
        lambda single, pair, mask, rotation, translation: forward(single, pair, mask, rotation, translation)
    )


def esmfold(config: IPAConfig) -> Any:
    return peers.esmfold_module(make_case("", config).astype("float32"))


class Peer(NamedTuple):
    """A published attention with a config, and the dtypes that it computes in."""

    package: str
    make: Callable[[IPAConfig], Any]
    config: IPAConfig
    dtypes: tuple[str, ...]


LUCIDRAINS = ("invariant_point_attention", peers.lucidrains_module)

PEERS = {
    "alphafold monomer": Peer("alphafold", alphafold, IPAConfig.alphafold2(), ("float32", "float64")),
    "alphafold multimer": Peer("alphafold", alphafold, IPAConfig.alphafold_multimer(), ("float32",)),
    "esmfold": Peer("transformers", esmfold, IPAConfig.esmfold(), ("float32",)),
    "lucidrains": Peer(
        *LUCIDRAINS, IPAConfig.lucidrains(64, point_value_dim=3, pairwise_repr_dim=32), ("float32", "float64")
    ),
    "lucidrains without pair": Peer(
        *LUCIDRAINS, IPAConfig.lucidrains(64, require_pairwise_repr=False), ("float32", "float64")
    ),
}


@pytest.mark.covering
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("protein", ["peptide", "1gcn.pdb", "2rbg.pdb"])
@pytest.mark.parametrize(("peer", "dtype"), [(name, dtype) for name, x in PEERS.items() for dtype in x.dtypes])
def test_a_published_implementation_is_right(peer, dtype, protein, request, compared_with_peers):
    """On a protein and on the judge's own inputs."""
    package, make, config, _ = PEERS[peer]
    pytest.importorskip(package)
    structure = structure_of(protein, request)
    report = check(make(config), config, structure=structure, dtypes=(dtype,), name="peer")
    assert report.passed, str(report)
    rows = [
        replace(row, case=f"{peer}, {protein if row.case == 'the structure' else row.case}")
        for row in report.comparisons
    ]
    assert {"out", "gradient/rotation", "gradient/trainable_point_weights"} <= {row.stage for row in rows}
    compared_with_peers += rows


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
        ours = run_ours(case, gradients=False)["out"]
        row = compare(theirs, ours, case=case.name, stage="out", dtype="float32", subject="peer", reference=framework)
        assert row.passed, str(row)


def structure_of(protein: str, request: pytest.FixtureRequest):
    if protein == "peptide":
        return idealised_peptide()
    structure = load_structure(request.getfixturevalue("structures_dir") / protein)
    fields = ("rotation", "translation", "mask", "aatype", "chain_id", "residue_number", "insertion_code")
    return replace(structure, **{field: getattr(structure, field)[:120] for field in fields})
