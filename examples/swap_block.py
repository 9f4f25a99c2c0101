"""Makes a block of `invariant-point-attention` use our attention, in one line: same outputs, less time and memory.

    python examples/swap_block.py [--residues 256 512 1024] [--backward]

In your own model the same line finds every block: `ipa_torch.replace_ipa(model)`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import ipa_torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from before_and_after import arguments, same, table

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from invariant_point_attention import IPABlock


def prepare(number: int, gradients: bool, swapped: bool) -> Callable[[], torch.Tensor | tuple[torch.Tensor, ...]]:
    """Prepares a call of a block with the package's default sizes on random inputs."""
    torch.manual_seed(0)
    block = IPABlock(dim=64, heads=8)
    if swapped:
        ipa_torch.replace_ipa(block)
    x = torch.randn(1, number, 64, requires_grad=gradients)
    pair = torch.randn(1, number, number, 64, requires_grad=gradients)
    frames = {"rotations": torch.eye(3).expand(1, number, 3, 3), "translations": torch.randn(1, number, 3)}

    def call() -> torch.Tensor | tuple[torch.Tensor, ...]:
        with torch.set_grad_enabled(gradients), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = block(x, pairwise_repr=pair, **frames)
            return torch.autograd.grad((out**2).sum(), [x, pair, *block.parameters()]) if gradients else out

    return call


def main() -> None:
    """Swaps the attention, compares and measures."""
    args = arguments(__doc__)
    print(ipa_torch.replace_ipa(IPABlock(dim=64, heads=8)))
    before, after = (prepare(128, False, swapped)() for swapped in (False, True))
    print(same(before.numpy(), after.numpy(), "out", "128 residues"))
    print(table(prepare, args.residues, args.repeats, backward=args.backward))


if __name__ == "__main__":
    main()
