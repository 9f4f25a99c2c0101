"""Modules of ipa_torch saved whole with `torch.save` still load after code has moved within the packages.

`data/modules.pt` holds one module of each kind, and `data/replaced.pt` another package's layer that was replaced by
ours; both hold inputs and outputs, from version 0.1.0. `python -m parity_tests.weights.test_pickles` writes both files.
Write them again only for a version that is meant to break old pickles.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ipa_bridge import IPAConfig, IPATransformerConfig, PredictedLDDTConfig, StructureModuleConfig, Weights
from ipa_bridge.config import IPABlockConfig

torch = pytest.importorskip("torch")
ipa_torch = pytest.importorskip("ipa_torch")

SAVED = Path(__file__).parents[1] / "data" / "modules.pt"
REPLACED = SAVED.with_name("replaced.pt")

WIDTHS = {"num_channel": 8, "pair_channel": 6, "num_head": 2, "num_scalar_qk": 3, "num_point_qk": 2}
MONOMER = dataclasses.replace(IPAConfig.alphafold2(), **WIDTHS)
MULTIMER = dataclasses.replace(IPAConfig.alphafold_multimer(), **WIDTHS)
WITHOUT_PAIR = IPAConfig.lucidrains(8, heads=2, require_pairwise_repr=False)
STRUCTURE_MODULE = dataclasses.replace(
    StructureModuleConfig.alphafold2(), ipa=MONOMER, num_layer=2, sidechain_channel=8
)


def modules() -> dict:
    """One module of each kind, with the arguments of a call."""
    torch.manual_seed(0)
    single, pair, rigids, mask = (
        torch.randn(5, 8),
        torch.randn(5, 5, 6),
        ipa_torch.Rigid.random((5,)),
        torch.arange(5) < 4,
    )
    aatype = torch.arange(5)
    attention = (single, pair, rigids, mask)
    transformer = IPATransformerConfig.lucidrains(8, depth=2, heads=2, num_tokens=21, require_pairwise_repr=False)
    block = IPABlockConfig.lucidrains(8, heads=2, require_pairwise_repr=False)
    made = {
        "attention": (MONOMER, ipa_torch.InvariantPointAttention, attention),
        "multimer": (MULTIMER, ipa_torch.InvariantPointAttention, attention),
        "without a pair": (WITHOUT_PAIR, ipa_torch.InvariantPointAttention, (single, None, rigids, mask)),
        "block": (block, ipa_torch.IPABlock, (single, None, rigids, mask)),
        "transformer": (transformer, ipa_torch.IPATransformer, (aatype,)),
        "structure module": (STRUCTURE_MODULE, ipa_torch.StructureModule, (single, pair, aatype, mask)),
        "confidence head": (PredictedLDDTConfig(num_channel=8, hidden_channel=8), ipa_torch.PredictedLDDT, (single,)),
    }
    saved = {}
    for name, (config, kind, arguments) in made.items():
        module = kind(config).eval()
        module.load_state_dict(Weights.random(config).to_torch())
        saved[name] = module, arguments
    return saved


def tensors(output) -> list:
    """All tensors in a tensor or nested tuples."""
    return [y for x in output for y in tensors(x)] if isinstance(output, tuple) else [output]


@pytest.fixture(scope="module")
def saved():
    return torch.load(SAVED, weights_only=False)  # the file is our own, so unpickling it is safe


@pytest.mark.parametrize("name", list(modules()))
def test_a_module_saved_whole_still_loads_and_computes_the_same(name, saved):
    module, arguments, expected = saved[name]
    torch.testing.assert_close(tensors(module(*arguments)), tensors(expected))


def test_every_module_is_saved(saved):
    kinds = {type(x) for module, *_ in saved.values() for x in module.modules()}
    public = {x for x in vars(ipa_torch).values() if isinstance(x, type) and issubclass(x, torch.nn.Module)}
    assert public <= kinds, public - kinds


def test_a_replaced_layer_saved_whole_still_loads_and_computes_the_same():
    pytest.importorskip("invariant_point_attention")
    layer, (single, geometry), expected = torch.load(REPLACED, weights_only=False)
    torch.testing.assert_close(layer(single, **geometry), expected)
    assert ipa_torch.restore_ipa(layer)


def replaced() -> tuple:
    """An attention of `invariant-point-attention` replaced by ours, and the arguments of a call."""
    from invariant_point_attention import InvariantPointAttention

    torch.manual_seed(0)
    layer = InvariantPointAttention(dim=8, heads=2, require_pairwise_repr=False)
    ipa_torch.replace_ipa(layer)
    rigids = ipa_torch.Rigid.random((1, 5))
    geometry = {"rotations": rigids.rotation, "translations": rigids.translation, "mask": torch.arange(5)[None] < 4}
    return layer, (torch.randn(1, 5, 8), geometry)


if __name__ == "__main__":
    with torch.no_grad():
        torch.save({name: (x, given, x(*given)) for name, (x, given) in modules().items()}, SAVED)
        layer, (single, geometry) = replaced()
        torch.save((layer, (single, geometry), layer(single, **geometry)), REPLACED)
    print(f"{SAVED}: {SAVED.stat().st_size:,} bytes")
