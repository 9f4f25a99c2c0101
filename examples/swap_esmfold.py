"""Makes Hugging Face's ESMFold use our attention, in one line: same outputs, less time and memory.

    python examples/swap_esmfold.py [--residues 256 512 1024] [--backward]

The model here has random weights, a small language model and trunk, and ESMFold's own structure module. The same line
works with the published model:

    model = EsmForProteinFolding.from_pretrained("facebook/esmfold_v1")
    print(ipa_torch.replace_ipa(model))

The measurement compares the structure module, eight layers with shared weights, before and after.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import EsmConfig, EsmForProteinFolding
from transformers.models.esm.configuration_esm import get_default_vocab_list

import ipa_torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from before_and_after import arguments, same, table


def small_esmfold(seed: int = 0) -> EsmForProteinFolding:
    """A model with random weights: two language-model layers, one trunk block, and the whole structure module."""
    torch.manual_seed(seed)
    trunk = {
        "num_blocks": 1,
        "sequence_state_dim": 64,
        "pairwise_state_dim": 32,
        "sequence_head_width": 32,
        "pairwise_head_width": 32,
        "max_recycles": 1,
    }
    config = EsmConfig(
        vocab_size=33,
        mask_token_id=32,
        pad_token_id=1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        position_embedding_type="rotary",
        is_folding_model=True,
        vocab_list=get_default_vocab_list(),
        esmfold_config={"fp16_esm": False, "trunk": trunk},
    )
    return EsmForProteinFolding(config).eval()


def prepare(number: int, gradients: bool, swapped: bool) -> Callable[[], object]:
    """Prepares a call of the structure module on random representations."""
    module = small_esmfold().trunk.structure_module
    if swapped:
        ipa_torch.replace_ipa(module)
    generator = torch.Generator().manual_seed(1)
    single = torch.randn(1, number, 384, generator=generator, requires_grad=gradients)
    pair = torch.randn(1, number, number, 128, generator=generator, requires_grad=gradients)
    aatype = torch.randint(0, 20, (1, number), generator=generator)

    def call() -> object:
        with torch.set_grad_enabled(gradients):
            positions = module({"single": single, "pair": pair}, aatype)["positions"][-1]
            if not gradients:
                return positions
            return torch.autograd.grad((positions**2).sum(), [single, pair, *module.parameters()])

    return call


def main() -> None:
    """Swaps the attention, compares and measures."""
    args = arguments(__doc__)
    model = small_esmfold()
    sequence = torch.randint(0, 20, (1, 128), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before = model(sequence)
        print(ipa_torch.replace_ipa(model))
        after = model(sequence)
    print(same(before.positions.numpy(), after.positions.numpy(), "atom14", "atoms of 128 residues"))
    print(table(prepare, args.residues, args.repeats, backward=args.backward))


if __name__ == "__main__":
    main()
