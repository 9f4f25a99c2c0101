"""The command `ipa-parity`: is the Haiku IPA the same function as the PyTorch IPA, on your weights and protein?"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import cast

from ipa_bridge.config import IPAConfig
from ipa_bridge.frames import idealised_peptide
from ipa_bridge.structures import Structure, load_structure
from ipa_bridge.weights import Weights
from ipa_parity.cases import PRESETS, Case, load_weights, make_case
from ipa_parity.parity import installed_frameworks, judge
from ipa_parity.report import Comparison, as_json, table

DTYPES = ("float32", "float64", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 0 if everything compared is within its bound, 1 if not, 2 if the question is wrong."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        frameworks = _frameworks(args.require)
        cases = _cases(args)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    progress = _Progress(shown=not args.quiet)
    started = time.perf_counter()
    comparisons: list[Comparison] = []
    described = []
    for make in cases:
        case = make()
        described.append(f"{case.name}: {case.mask.size} residues, {case.mask.size - case.mask.sum()} of them masked")
        for dtype in args.dtype or ("float32", "float64"):
            comparisons += judge(
                case,
                dtype,
                frameworks=frameworks,
                gradients=not args.no_gradients,
                progress=lambda step, name=case.name: progress(f"{name}: {step}"),  # type: ignore[misc]
            )
        del case  # before the next is drawn
    progress.clear()
    failures = [row for row in comparisons if not row.passed]
    if args.json:
        report = {"passed": not failures, "frameworks": list(frameworks), "comparisons": as_json(comparisons)}
        print(json.dumps(report, indent=1))
    else:
        print(_report(described, frameworks, comparisons, failures, time.perf_counter() - started))
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ipa-parity", description=__doc__)
    parser.add_argument("--weights", metavar="FILE", help="an IPA's weights: .npz (AlphaFold's), .safetensors or .pt")
    parser.add_argument("--structure", metavar="FILE", help="a protein whose frames to use: PDB or mmCIF")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="the model, with seeded weights (default: both AlphaFold layouts); beside --weights, whose norm to use",
    )
    parser.add_argument("--residues", type=_several, help="random frames (default: 64, and an idealised peptide)")
    parser.add_argument(
        "--dtype", choices=DTYPES, action="append", help="may be repeated (default: float32 and float64)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, activations and frames (default: %(default)s)")
    parser.add_argument("--no-gradients", action="store_true", help="compare outputs only")
    parser.add_argument(
        "--require", default="jax,torch", help="frameworks that must be installed (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="every comparison, as JSON on standard output")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    return parser


def _several(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(
            f"must be at least 2, for a residue alone has only itself to see; got {number}"
        )
    return number


def _frameworks(require: str) -> tuple[str, ...]:
    frameworks = installed_frameworks()
    missing = [name for name in require.split(",") if name and name not in frameworks]
    if missing:
        raise ValueError(
            f"not installed: {', '.join(missing)}. Install ipa-twins[{','.join(missing)}], or pass "
            f"--require='{','.join(frameworks)}' to compare what there is with the float64 oracle"
        )
    return frameworks


def _cases(args: argparse.Namespace) -> list[Callable[[], Case]]:
    """Cases that are drawn when their turn comes: of a large protein, two do not fit in memory."""
    if args.structure and args.residues:
        raise ValueError("--structure brings its own residues: leave --residues out")
    models: dict[str, tuple[IPAConfig, Weights | None]]
    structures: dict[str, Structure | None]
    if args.weights:
        weights = load_weights(args.weights, args.preset)
        if not weights.arrays["output_projection/weights"].any():
            raise ValueError(
                f"{args.weights}: output_projection is zero, as an untrained model's: every output is its bias, and "
                f"there is nothing to compare. Train it, or pass --preset alone for seeded weights"
            )
        models = {Path(args.weights).name: (cast(IPAConfig, weights.config), weights)}
    else:
        names = [args.preset] if args.preset else ["alphafold2", "alphafold-multimer"]
        models = {name: (PRESETS[name](), None) for name in names}
    if args.structure:
        structure = load_structure(args.structure)
        if structure.mask.sum() < 2:
            raise ValueError(f"{args.structure}: at least 2 residues with a backbone are needed, to see each other")
        structures = {Path(args.structure).name: structure}
    else:
        residues = args.residues or 64
        structures = {f"{residues} random frames": None, "idealised peptide": idealised_peptide()}
    return [
        partial(
            make_case,
            f"{model}, {frames}",
            config,
            (args.residues or 64,),
            seed=args.seed,
            weights=weights,
            structure=structure,
        )
        for model, (config, weights) in models.items()
        for frames, structure in structures.items()
    ]


def _report(
    cases: Sequence[str],
    frameworks: Sequence[str],
    comparisons: Sequence[Comparison],
    failures: Sequence[Comparison],
    seconds: float,
) -> str:
    lines = ["Worst error of each stage over all cases, in machine epsilons of its dtype:", ""]
    lines += [*(f"  {case}" for case in cases), "", table(comparisons), ""]
    lines += [f"FAIL {row}" for row in failures]
    worst = max(comparisons, key=lambda row: float("inf") if row.problem else row.error / row.bound)
    verdict = (
        f"{len(failures)} of {len(comparisons)} comparisons failed"
        if failures
        else (f"all {len(comparisons)} comparisons passed; closest to its bound: {worst}")
    )
    alone = ""
    if len(frameworks) < 2:
        alone = f" ({frameworks[0]} only: the other framework, which judges float64 gradients, is not installed)"
    return "\n".join([*lines, f"{verdict}{alone}. {seconds:.0f} s"])


class _Progress:
    """One line on standard error that says what is running; nothing where that is not a terminal's line."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self.in_place = sys.stderr.isatty()
        self.started = time.perf_counter()

    def __call__(self, step: str) -> None:
        if not self.shown:
            return
        seconds = f"{time.perf_counter() - self.started:5.0f} s"
        if self.in_place:
            print(f"\r\033[K{seconds}  {step}", end="", file=sys.stderr, flush=True)
        else:
            print(f"{seconds}  {step}", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.shown and self.in_place:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
