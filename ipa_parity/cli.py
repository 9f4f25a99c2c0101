"""Compares the Haiku and the PyTorch model on the same weights and protein: the command `ipa-parity`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from ipa_bridge.config import IPAConfig, StructureModuleConfig
from ipa_bridge.console import Progress, as_command
from ipa_bridge.proteins import Structure, load_structure
from ipa_bridge.proteins.frames import idealised_peptide
from ipa_bridge.tolerance import DTYPES
from ipa_bridge.version import __version__
from ipa_bridge.weights import Weights
from ipa_parity.attention.cases import PRESETS, load_weights, make_case
from ipa_parity.attention.judge import judge as judge_attention
from ipa_parity.frameworks import installed_frameworks
from ipa_parity.report import Comparison, as_json, table
from ipa_parity.structure_module import cases as structure_modules
from ipa_parity.structure_module.judge import judge as judge_structure_module

EXAMPLES = """\
examples:
  ipa-parity
  ipa-parity --weights params_model_1.npz --structure 1gcn.pdb
  ipa-parity --module structure-module --structure 1gcn.pdb --json
  ipa-parity check mylab.model:MyIPA    (is your own attention right? see ipa-parity check --help)
  ipa-parity vectors DIR                (inputs and results for other languages, see ipa-parity vectors --help)
"""

KINKS = (
    "Errors of gradients in float32 are in the Euclidean norm, because a few of millions of ReLUs are open in one run\n"
    "and shut in the other. In float64 this does not happen. There the bounds of gradients grow as the shortest\n"
    "predicted torsion vector shrinks, because gradients are divided by its length."
)


@as_command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0 if every comparison is within its bound, 1 if not, 2 for wrong arguments."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "check":
        from ipa_parity.checking.cli import main as check

        return check(argv[1:])
    if argv and argv[0] == "vectors":
        from ipa_parity.vectors.cli import main as vectors

        return vectors(argv[1:])
    args = _parser().parse_args(argv)
    try:
        frameworks = _frameworks(args.require)
        cases, judge = MODULES[args.module](args)
    except (ValueError, OSError, ImportError) as error:
        print(f"ipa-parity: {error}", file=sys.stderr)
        return 2
    progress = Progress(shown=not args.quiet)
    started = time.perf_counter()
    comparisons: list[Comparison] = []
    described = []
    for make in cases:
        case = make()
        masked = case.mask.size - case.mask.sum()
        described.append(f"{case.name}: {case.mask.size} residues, {masked} masked for the test")
        for dtype in args.dtype or ("float32", "float64"):
            comparisons += judge(
                case,
                dtype,
                frameworks=frameworks,
                gradients=not args.no_gradients,
                progress=lambda step, name=case.name: progress(f"{name}: {step}"),
            )
        del case  # frees memory before the next case is drawn
    progress.clear()
    if not comparisons:
        print(
            f"ipa-parity: nothing was compared: {frameworks[0]} alone has no reference in {' and '.join(args.dtype)}; "
            f"add --dtype float32, or install the other framework",
            file=sys.stderr,
        )
        return 2
    failures = [row for row in comparisons if not row.passed]
    if args.json:
        report = {"passed": not failures, "frameworks": list(frameworks), "comparisons": as_json(comparisons)}
        print(json.dumps(report, indent=1))
    else:
        note = KINKS if args.module == "structure-module" and not args.no_gradients else ""
        print(_report(described, frameworks, comparisons, failures, note, time.perf_counter() - started))
    return 1 if failures else 0


Question = tuple[list[Callable[[], Any]], Callable[..., Iterator[Comparison]]]
"""Functions that draw the cases, one at a time since two large ones may not fit in memory, and their judge."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ipa-parity", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"ipa-twins {__version__}")
    parser.add_argument("--module", choices=MODULES, default="ipa", help="the attention, or a whole structure module")
    parser.add_argument(
        "--weights", metavar="FILE", help="the model's weights: .npz (AlphaFold's), .safetensors or .pt"
    )
    parser.add_argument("--structure", metavar="FILE", help="a protein to run on: PDB or mmCIF")
    parser.add_argument(
        "--preset",
        choices=list(PRESETS | structure_modules.PRESETS),
        help="without --weights: the model, which gets seeded weights (default: both of AlphaFold's layouts); with "
        "--weights: the system whose norm and units to use",
    )
    parser.add_argument(
        "--residues",
        type=_several,
        help="number of residues with random frames (default: 64); an idealised peptide runs too",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        action="append",
        help="dtype to run in; may be repeated (default: float32 and float64)",
    )
    parser.add_argument(
        "--seed", type=_seed, default=0, help="seed of weights, activations and frames (default: %(default)s)"
    )
    parser.add_argument("--no-gradients", action="store_true", help="compare outputs only")
    parser.add_argument(
        "--require", default="jax,torch", help="frameworks that must be installed (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print every comparison as JSON on standard output")
    parser.add_argument("--quiet", action="store_true", help="print no progress on standard error")
    return parser


def _several(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number; got {text!r}") from None
    if number < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, so that residues can attend to each other; got {number}")
    return number


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number from 0; got {text!r}")
    return int(text)


def _frameworks(require: str) -> tuple[str, ...]:
    frameworks = installed_frameworks()
    unknown = [name for name in require.split(",") if name not in ("", "jax", "torch")]
    if unknown:
        raise ValueError(f"--require takes jax, torch or both, as jax,torch; got {', '.join(unknown)}")
    missing = [name for name in require.split(",") if name and name not in frameworks]
    if missing:
        raise ValueError(
            f"not installed: {', '.join(missing)}. Install ipa-twins[{','.join(missing)}], or pass "
            f"--require='{','.join(frameworks)}' to compare the installed framework with the float64 oracle"
        )
    return frameworks


def _ipa(args: argparse.Namespace) -> Question:
    if args.preset not in (None, *PRESETS):
        raise ValueError(f"--module ipa has the presets {', '.join(PRESETS)}; got {args.preset}")
    if args.structure and args.residues:
        raise ValueError("--structure has its own residues: leave out --residues")
    models: dict[str, tuple[IPAConfig, Weights | None]]
    structures: dict[str, Structure | None]
    if args.weights:
        weights = load_weights(args.weights, args.preset)
        _check_trained(args.weights, weights, "output_projection/weights")
        models = {Path(args.weights).name: (cast(IPAConfig, weights.config), weights)}
    else:
        names = [args.preset] if args.preset else ["alphafold2", "alphafold-multimer"]
        models = {name: (PRESETS[name](), None) for name in names}
    if args.structure:
        structures = {Path(args.structure).name: _protein(args.structure)}
    else:
        residues = args.residues or 64
        structures = {f"{residues} random frames": None, "idealised peptide": idealised_peptide()}
    shape = (args.residues or 64,)
    cases = [
        partial(make_case, f"{model}, {frames}", config, shape, seed=args.seed, weights=weights, structure=structure)
        for model, (config, weights) in models.items()
        for frames, structure in structures.items()
    ]
    return cast(list[Callable[[], Any]], cases), judge_attention


def _structure_module(args: argparse.Namespace) -> Question:
    if args.residues:
        raise ValueError("--module structure-module runs on a protein's residues: leave out --residues")
    half = [dtype for dtype in args.dtype or () if dtype not in ("float32", "float64")]
    if half:
        raise ValueError(f"--module structure-module takes --dtype float32 or float64; got {half[0]}")
    presets = structure_modules.PRESETS
    if args.preset not in (None, *presets):
        raise ValueError(f"--module structure-module has the presets {', '.join(presets)}; got {args.preset}")
    models: dict[str, tuple[StructureModuleConfig, Weights | None]]
    if args.weights:
        weights = structure_modules.load_weights(args.weights, args.preset)
        attention = "fold_iteration/invariant_point_attention"
        _check_trained(args.weights, weights, f"{attention}/output_projection/weights")
        models = {Path(args.weights).name: (cast(StructureModuleConfig, weights.config), weights)}
    else:
        names = [args.preset] if args.preset else ["alphafold2", "alphafold-multimer"]
        models = {name: (presets[name](), None) for name in names}
    protein, structure = "idealised peptide", None
    if args.structure:
        protein, structure = Path(args.structure).name, _protein(args.structure)
    make = structure_modules.make_case
    cases = [
        partial(make, f"{model}, {protein}", config, structure=structure, seed=args.seed, weights=weights)
        for model, (config, weights) in models.items()
    ]
    return cast(list[Callable[[], Any]], cases), judge_structure_module


MODULES: dict[str, Callable[[argparse.Namespace], Question]] = {"ipa": _ipa, "structure-module": _structure_module}


def _protein(path: str) -> Structure:
    structure = load_structure(path)
    if structure.mask.sum() < 2:
        raise ValueError(f"{path}: expected at least 2 residues with a backbone; got {structure.mask.sum()}")
    return structure


def _check_trained(path: str, weights: Weights, name: str) -> None:
    if not weights.arrays[name].any():
        raise ValueError(
            f"{path}: {name.rpartition('/')[0]} is zero, as in an untrained model: every output is its bias, and there "
            f"is nothing to compare. Pass trained weights, or --preset alone for seeded weights"
        )


def _report(
    cases: Sequence[str],
    frameworks: Sequence[str],
    comparisons: Sequence[Comparison],
    failures: Sequence[Comparison],
    note: str,
    seconds: float,
) -> str:
    lines = ["Worst error of each stage over all cases, in machine epsilons of its dtype:", ""]
    lines += [*(f"  {case}" for case in cases), "", table(comparisons), "", *([note, ""] if note else [])]
    lines += [f"FAIL {row}" for row in failures]
    worst = max(comparisons, key=lambda row: float("inf") if row.problem else row.error / row.bound)
    verdict = (
        f"{len(failures)} of {len(comparisons)} comparisons failed"
        if failures
        else (
            f"all {len(comparisons)} comparisons passed: the same function to rounding (this says nothing about the "
            f"weights or the protein); closest to its bound: {worst}"
        )
    )
    alone = ""
    if len(frameworks) < 2:
        alone = f" ({frameworks[0]} only: the other framework, the reference of float64 gradients, is not installed)"
    return "\n".join([*lines, f"{verdict}{alone}. {seconds:.0f} s"])
