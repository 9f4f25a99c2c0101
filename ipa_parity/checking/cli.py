"""Checks anyone's invariant point attention, and says what it gets wrong: the command `ipa-parity check`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ipa_bridge.console import Progress
from ipa_bridge.proteins import load_structure
from ipa_bridge.tolerance import DTYPES
from ipa_bridge.weights import Weights
from ipa_parity.attention.cases import PRESETS, load_weights
from ipa_parity.checking import check
from ipa_parity.checking.pieces import PIECES
from ipa_parity.checking.reporting import Report
from ipa_parity.vectors.judging import judge_outputs

EXAMPLES = """\
examples:
  ipa-parity check mylab.model:MyIPA --kwargs '{"c_s": 384, "c_z": 128}' --parameters openfold
  ipa-parity check model.py:attention --preset alphafold2
  ipa-parity check model.py:model --parameters names.json --structure 1gcn.pdb --json
  ipa-parity check model.py:backbone_update --piece backbone-update
  ipa-parity check --outputs mine --vectors vectors    (what a program in any language wrote; ipa-parity vectors --help)

exit status: 0 for a right candidate, 1 for one that is wrong or imprecise, 2 for wrong arguments
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command. Returns 0 if the candidate is right, 1 if it is not, 2 for wrong arguments."""
    parser = _parser()
    args = parser.parse_args(argv)
    progress = Progress(shown=not args.quiet)
    try:
        report = _run(args, progress)
    except (ValueError, OSError, ImportError, TypeError) as error:
        progress.clear()
        print(f"ipa-parity check: {error}", file=sys.stderr)
        return 2
    progress.clear()
    print(json.dumps(report.as_json(), indent=1) if args.json else report)
    return 0 if report.passed else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ipa-parity check",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "target",
        nargs="?",
        help="a class, an instance or a function, as package.module:name or path/to/file.py:name",
    )
    parser.add_argument(
        "--piece", choices=PIECES, help="the target is this function of the structure module (default: the attention)"
    )
    parser.add_argument("--outputs", metavar="PATH", help="in place of a target: a folder or file of its outputs")
    parser.add_argument("--vectors", metavar="DIR", help="with --outputs: the folder of ipa-parity vectors")
    parser.add_argument("--kwargs", metavar="JSON", help="arguments of a class, as a JSON object")
    parser.add_argument(
        "--preset", choices=PRESETS, help="the config (default: read from the shapes of its parameters)"
    )
    parser.add_argument(
        "--parameters",
        metavar="DIALECT|FILE",
        help="the system whose names its parameters have, or a JSON file with its names and ours (default: recognised)",
    )
    parser.add_argument(
        "--call", metavar="NAME", help="a function of (candidate, single, pair, rotation, translation, mask), as target"
    )
    parser.add_argument("--framework", choices=("numpy", "torch", "jax"), help="the arrays that a function takes")
    parser.add_argument("--weights", metavar="FILE", help="weights to give it: .npz, .safetensors or .pt")
    parser.add_argument("--structure", metavar="FILE", help="a protein to run on too: PDB or mmCIF")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        action="append",
        help="dtype to run in; may be repeated (default: float32 and float64)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default: %(default)s)")
    parser.add_argument("--no-gradients", action="store_true", help="compare outputs only")
    parser.add_argument("--json", action="store_true", help="print the report as JSON on standard output")
    parser.add_argument("--quiet", action="store_true", help="print no progress on standard error")
    return parser


def _run(args: argparse.Namespace, progress: Progress) -> Report:
    if args.outputs or args.vectors or not args.target:
        return _judge_outputs(args, progress)
    parameters: Any = args.parameters
    if parameters and os.path.isfile(parameters):
        parameters = _table(parameters)
    weights: Weights | None = load_weights(args.weights, args.preset) if args.weights else None
    candidate, name = load_target(args.target, args.kwargs), args.target.rpartition(":")[2]
    if args.piece:
        return _judge_piece(args, candidate, name, progress)
    return check(
        candidate,
        args.preset,
        parameters=parameters,
        call=_import(args.call) if args.call else None,
        framework=args.framework,
        weights=weights,
        structure=load_structure(args.structure) if args.structure else None,
        dtypes=args.dtype or ("float32", "float64"),
        gradients=not args.no_gradients,
        seed=args.seed,
        name=name,
        progress=lambda step: progress(f"{name}: {step}"),
    )


def _table(path: str) -> dict[str, str]:
    """A table of parameters from a JSON file.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        table = json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: a JSON object from its names to ours was expected; {error}") from error
    if not isinstance(table, dict) or not all(isinstance(x, str) for x in table.values()):
        raise ValueError(f"{path}: a JSON object from its names to ours was expected; got {str(table)[:60]}")
    return table


def _judge_piece(args: argparse.Namespace, candidate: Any, name: str, progress: Progress) -> Report:
    others = ("preset", "parameters", "call", "weights", "structure")
    if given := [x for x in others if getattr(args, x)]:
        raise ValueError(f"--piece {args.piece} has no use for --{given[0]}: leave it out")
    return PIECES[args.piece][1](
        candidate,
        framework=args.framework,
        dtypes=args.dtype or ("float32", "float64"),
        gradients=not args.no_gradients,
        seed=args.seed,
        name=name,
        progress=lambda step: progress(f"{name}: {step}"),
    )


def _judge_outputs(args: argparse.Namespace, progress: Progress) -> Report:
    if args.target or not args.outputs or not args.vectors:
        raise ValueError("a target, or --outputs and --vectors together, was expected; see ipa-parity check --help")
    others = ("kwargs", "preset", "parameters", "call", "framework", "weights", "structure", "dtype", "no_gradients")
    if given := [f"--{name.replace('_', '-')}" for name in others if getattr(args, name)]:
        raise ValueError(f"--outputs and --vectors alone were expected, since vectors fix the rest; got {given[0]} too")
    return judge_outputs(Path(args.outputs), Path(args.vectors), progress)


def load_target(target: str, kwargs: str | None) -> Any:
    """The object that a target names; a class is instantiated with the keyword arguments.

    Raises:
        ValueError: there is no such thing, or the class cannot be made with these arguments.
    """
    found = _import(target)
    if not inspect.isclass(found):
        if kwargs:
            raise ValueError(f"--kwargs is for a class; {target} is a {type(found).__name__}")
        return found
    try:
        given = json.loads(kwargs or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"--kwargs takes a JSON object, as '{{\"dim\": 64}}'; got {kwargs!r} ({error})") from None
    try:
        return found(**given)
    except Exception as error:
        raise ValueError(f"{target} cannot be made with --kwargs '{kwargs or '{}'}': {error}") from error


def _import(target: str) -> Any:
    """The object that package.module:name or path/to/file.py:name names."""
    where, colon, name = target.rpartition(":")
    if not colon or not where or not name:
        raise ValueError(f"package.module:name or path/to/file.py:name was expected; got {target!r}")
    if where.endswith(".py"):
        if not os.path.isfile(where):
            raise ValueError(f"{where}: there is no such file")
        sys.path.insert(0, str(Path(where).resolve().parent))
        where = Path(where).stem
    else:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(where)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{where} has no {name}; it has {', '.join(_public(found)) or 'nothing public'}")
        found = getattr(found, part)
    return found


def _public(module: Any) -> list[str]:
    own = [name for name, x in vars(module).items() if getattr(x, "__module__", None) == module.__name__]
    return [name for name in own if not name.startswith("_")][:10]
