"""Whole-IPA time, ours against AlphaFold's haiku class and ESMFold's torch class: ratios, measured interleaved."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.clock import Timed, interleaved
from ipa_bridge.config import IPAConfig
from ipa_bridge.tensors import torch_tensor
from ipa_parity import peers
from ipa_parity.cases import CATALOGUE, Case, make_case
from ipa_parity.parity import judge
from ipa_parity.stages import RUNNERS


def main() -> int:
    """Runs the gate, then the clock; 1 if the gate fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--residues", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--implementation", choices=["reference", "streamed"], help="of ours (default: as users get it)"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    runners = {name: partial(run, implementation=args.implementation) for name, run in RUNNERS.items()}
    failures = [str(row) for row in judge(CATALOGUE["alphafold2"](), "float32", runners=runners) if not row.passed]
    if failures:
        print("parity fails, so there is no speed to speak of:", *failures, sep="\n  ", file=sys.stderr)
        return 1
    rows = [row for residues in args.residues for row in measure(residues, args.repeats, args.implementation)]
    print(json.dumps(rows, indent=1) if args.json else table(rows))
    return 0


def measure(residues: int, repeats: int, implementation: str | None) -> list[dict]:
    """One row per framework and direction: the median and the range of our time over the peer's."""
    case = make_case(f"{residues} residues", IPAConfig.alphafold2(), (residues,)).astype("float32")
    rows = []
    for framework, peer, make in (("jax", "AlphaFold (jit)", jax_calls), ("torch", "ESMFold", torch_calls)):
        for direction, (ours, theirs) in make(case, implementation).items():
            print(f"{residues} residues, {framework} {direction}", file=sys.stderr, flush=True)
            ratios = interleaved(ours, theirs, repeats)
            rows.append(
                {
                    "residues": residues,
                    "framework": framework,
                    "peer": peer,
                    "direction": direction,
                    "ratio": statistics.median(ratios),
                    "least": min(ratios),
                    "most": max(ratios),
                }
            )
    return rows


def jax_calls(case: Case, implementation: str | None) -> dict[str, tuple[Timed, Timed]]:
    """Our haiku IPA and AlphaFold's, both under jit: forward, and gradients to parameters and activations."""
    import haiku as hk
    import jax

    import ipa_jax

    params = jax.tree.map(jax.numpy.asarray, case.weights.to_haiku())
    names = ("single", "pair", "mask", "rotation", "translation")
    single, pair, mask, rotation, translation = (jax.numpy.asarray(getattr(case, name)) for name in names)
    alphafold: Any = hk.without_apply_rng(hk.transform(peers.alphafold_forward(case.config)))
    ipa = ipa_jax.transform_ipa(case.config, implementation=implementation)

    def pair_of(wrap: Callable) -> tuple[Timed, Timed]:
        ours = wrap(lambda p, s, z: ipa.apply(p, s, z, ipa_jax.Rigid(rotation, translation), mask))
        theirs = wrap(lambda p, s, z: alphafold.apply(p, s, z, mask, rotation, translation))
        return tuple(lambda f=f: jax.block_until_ready(f(params, single, pair)) for f in (ours, theirs))  # type: ignore

    return {
        "forward": pair_of(jax.jit),
        "forward + backward": pair_of(lambda f: jax.jit(jax.grad(lambda *xs: (f(*xs) ** 2).sum(), (0, 1, 2)))),
    }


def torch_calls(case: Case, implementation: str | None) -> dict[str, tuple[Timed, Timed]]:
    """Our torch IPA and ESMFold's: forward, and gradients to parameters and activations."""
    import torch
    from transformers.models.esm.openfold_utils import Rigid, Rotation

    import ipa_torch

    module = ipa_torch.InvariantPointAttention(case.config, implementation=implementation)
    module.load_state_dict(case.weights.to_torch())
    esmfold = peers.esmfold_module(case)
    names = ("single", "pair", "rotation", "translation", "mask")
    single, pair, rotation, translation, mask = (torch_tensor(getattr(case, name)) for name in names)
    single.requires_grad_(), pair.requires_grad_()
    ours, theirs = ipa_torch.Rigid(rotation, translation), Rigid(Rotation(rot_mats=rotation), translation)

    def call_ours() -> Any:
        return module(single, pair, ours, mask)

    def call_theirs() -> Any:
        return esmfold(single, pair, theirs, mask.to(single.dtype))

    def forward(call: Timed) -> Timed:
        return torch.no_grad()(call)

    def backward(call: Timed, model: Any) -> Timed:
        return lambda: torch.autograd.grad((call() ** 2).sum(), [single, pair, *model.parameters()])

    return {
        "forward": (forward(call_ours), forward(call_theirs)),
        "forward + backward": (backward(call_ours, module), backward(call_theirs, esmfold)),
    }


def table(rows: list[dict]) -> str:
    """The rows in Markdown."""
    lines = ["| residues | ours | against | direction | time ratio (range) |", "|---:|---|---|---|---|"]
    lines += [
        f"| {r['residues']} | {r['framework']} | {r['peer']} | {r['direction']} "
        f"| {r['ratio']:.2f} ({r['least']:.2f}–{r['most']:.2f}) |"
        for r in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
