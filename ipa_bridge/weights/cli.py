"""The command `ipa-port`: converts weight files between systems, lists their contents and compares two of them."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ipa_bridge.console import Progress, as_command, table_lines
from ipa_bridge.destinations import check_destination
from ipa_bridge.tolerance import DTYPES
from ipa_bridge.version import __version__
from ipa_bridge.weights.conversion import LOSSES
from ipa_bridge.weights.dialects import DIALECTS, default_dialect, find_dialect
from ipa_bridge.weights.files import SUFFIXES
from ipa_bridge.weights.porting import MAX_VERIFIED_EPS, check_paths, compare, convert, inspect
from ipa_bridge.weights.reports import (
    Comparison,
    FileContents,
    FileConversion,
    ParameterComparison,
    Place,
    Verification,
)

EXAMPLES = """\
examples:
  ipa-port inspect params_model_1.npz
  ipa-port convert params_model_1.npz openfold.pt --to openfold --verify
  ipa-port compare params_model_1.npz openfold.pt
"""


@as_command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0 for success, 1 if files differ or a verification fails, 2 for an error."""
    try:
        _import_named(argv)
    except (ValueError, ImportError) as error:
        print(f"ipa-port: --import: {error}", file=sys.stderr)
        return 2
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError) as error:
        print(f"ipa-port {args.command}: {error}", file=sys.stderr)
        return 2


def _import_named(argv: Sequence[str] | None) -> None:
    """Imports the modules named by --import, before the other options are read: their dialects are choices there.

    A module is also found in the current directory, if it is nowhere else.
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--import", action="append", dest="imports", nargs="?", default=[])
    imports = [name for name in first.parse_known_args(argv)[0].imports if name]
    if not imports:
        return
    sys.path.append(os.getcwd())
    try:
        for name in imports:
            importlib.import_module(name)
    finally:
        sys.path.pop()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ipa-port", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"ipa-twins {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    convert = _convert_parser(commands)

    inspect = commands.add_parser("inspect", help="list the modules and parameters in a file")
    inspect.add_argument("file", metavar="FILE", help=f"file to read: {', '.join(SUFFIXES)}")
    inspect.add_argument(
        "--dialect",
        choices=DIALECTS,
        metavar="DIALECT",
        help=f"system whose names the file has (default: recognise it): {', '.join(DIALECTS)}",
    )
    inspect.add_argument("--root", help="path of the module; needed if there are several")
    inspect.set_defaults(run=_inspect)

    compare = commands.add_parser("compare", help="check whether two files hold the same function")
    compare.add_argument("files", nargs=2, metavar="FILE", help="the two files, A and B")
    for letter in "ab":
        compare.add_argument(
            f"--dialect-{letter}",
            choices=DIALECTS,
            metavar="DIALECT",
            help=f"system whose names file {letter.upper()} has (default: recognise it)",
        )
        compare.add_argument(
            f"--root-{letter}",
            metavar="PATH",
            help=f"path of the module in file {letter.upper()}; needed if there are several",
        )
    compare.set_defaults(run=_compare)

    for command in (convert, inspect, compare):
        command.add_argument("--json", action="store_true", help="print JSON")
        command.add_argument(
            "--import",
            action="append",
            metavar="MODULE",
            help="import this Python module first, which adds dialects with ipa_bridge.register_dialect",
        )
    return parser


def _convert_parser(commands: Any) -> argparse.ArgumentParser:
    convert = commands.add_parser("convert", help="write a module's weights in another system's form")
    convert.add_argument("source", metavar="SRC", help=f"file to read: {', '.join(SUFFIXES)}")
    convert.add_argument("destination", metavar="DST", help="file to write; its suffix sets the format")
    convert.add_argument(
        "--from",
        dest="source_dialect",
        choices=DIALECTS,
        metavar="DIALECT",
        help=f"system whose names SRC has (default: recognise it): {', '.join(DIALECTS)}",
    )
    convert.add_argument(
        "--to",
        choices=DIALECTS,
        metavar="DIALECT",
        help="system whose names DST gets (default: ours, ipa_jax for .npz and ipa_torch for other formats)",
    )
    convert.add_argument("--root", help="path of the module in SRC; needed if there are several")
    convert.add_argument(
        "--to-root",
        metavar="PATH",
        help="path of the module in DST (default: the module's own name if DST gets haiku names, none if torch names)",
    )
    convert.add_argument("--dtype", choices=DTYPES, help="round to this dtype (default: do not round)")
    convert.add_argument(
        "--allow-lossy",
        type=lambda text: text.split(","),
        default=[],
        metavar="LOSS[,LOSS…]",
        help=f"losses to allow, separated by commas: {', '.join(LOSSES)}",
    )
    convert.add_argument(
        "--verify",
        action="store_true",
        help="check on random input that both systems compute the same function; if not, DST is not written",
    )
    convert.add_argument("--force", action="store_true", help="replace DST if it exists")
    convert.set_defaults(run=_convert)
    return convert


def _convert(args: argparse.Namespace) -> int:
    destination = Path(args.destination)
    _check_destination(destination, Path(args.source), args.force)
    with _progress() as progress:
        report = convert(
            args.source,
            args.destination,
            source_dialect=args.source_dialect,
            source_root=args.root,
            dialect=args.to,
            root=_root(args.to_root, args.to or default_dialect(destination)),
            dtype=args.dtype,
            allow_lossy=args.allow_lossy,
            verified=args.verify,
            replace=args.force,
            progress=progress,
        )
    if args.json:
        values = dataclasses.asdict(report)
        if report.verified is None:
            del values["verified"]
        print(json.dumps(values, indent=1))
    else:
        print(_conversion(report, destination))
    return 0 if report.written else 1


def _root(asked: str | None, dialect: str) -> str | None:
    """The module's path in the destination, without a trailing separator."""
    if asked is None:
        return None
    root, separator = asked.rstrip("./"), find_dialect(dialect).separator
    if root and ("" in root.split(separator) or root.strip() != root):
        raise ValueError(f"--to-root must be names with {separator!r} between them; got {asked!r}")
    return root


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Shows a progress bar if reading takes longer than a second."""
    progress = Progress(delay=1)
    try:
        yield lambda name, done, of: progress.bar(f"reading {name}", done, of)
    finally:
        progress.clear()


def _check_destination(destination: Path, source: Path, force: bool) -> None:
    check_paths(source, destination)
    try:
        check_destination(destination, replace=force)
    except ValueError as error:
        raise ValueError(f"{error}; --force replaces an ordinary file") from None


def _conversion(report: FileConversion, destination: Path) -> str:
    target = find_dialect(report.destination.dialect)
    lines = [
        _place(report.source, report.module),
        f"{destination}: {report.converted} parameters for {target.title}, {report.numbers:,} numbers",
    ]
    if report.added:
        lines.append(f"added as zeros, since {target.title} expects but never reads them: {', '.join(report.added)}")
    lines += [f"lost, as allowed: {loss.name}: {loss.reason}" for loss in report.losses]
    lines += [f"note: {note}" for note in report.notes]
    if report.elsewhere:
        others = ", ".join(f"{stem} ({number})" for stem, number in sorted(report.elsewhere.items())[:8])
        more = len(report.elsewhere) - 8
        lines.append(
            f"not converted, {sum(report.elsewhere.values())} arrays of other parts of the model: {others}"
            + (f" and {more} more places" if more > 0 else "")
        )
    if report.ignored:
        lines.append(f"not converted, since they are not arrays with names: {_some(report.ignored)}")
    if report.verified is not None:
        lines += _verification(report.verified)
    if not report.written:
        lines.append("nothing was written")
    return "\n".join(lines)


def _verification(verified: Verification) -> list[str]:
    if verified.eps is None or verified.change is None:
        return ["NOT VERIFIED: outputs on random input overflow"]
    if not verified.passed:
        return [f"NOT THE SAME FUNCTION: outputs on random input are {verified.eps:.1f} eps of float64 apart"]
    lines = [f"verified on random input: the same function, within {verified.eps:.1f} eps of float64"]
    if verified.change > MAX_VERIFIED_EPS * float(np.finfo(np.float64).eps):
        lines.append(f"except that losses and rounding change outputs by {verified.change:.1e} of the largest")
    return lines


def _some(names: Sequence[str], limit: int = 10) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _inspect(args: argparse.Namespace) -> int:
    with _progress() as progress:
        report = inspect(args.file, dialect=args.dialect, root=args.root, progress=progress)
    if args.json:
        values = dataclasses.asdict(report)
        problem, contents = values.pop("problem"), values.pop("contents")
        print(json.dumps(values | ({"problem": problem} if contents is None else contents), indent=1))
    else:
        print(_contents(report))
    return 2 if report.contents is None else 0


def _contents(report: FileContents) -> str:
    lines = [f"{report.file}: {report.arrays} arrays"]
    places: dict[tuple[str, str], list[str]] = {}
    for each in report.modules:
        places.setdefault((each.module, each.root), []).append(each.dialect)
    lines += [f"  {module} at {root or 'the top'}: {' or '.join(whose)}" for (module, root), whose in places.items()]
    found = report.contents
    if found is None:
        return "\n".join([*lines, str(report.problem)])
    lines.append(_module(found.module, found.dialect, found.root))
    lines += [f"  {line}" for line in _config_lines(dataclasses.asdict(found.config), found.assumed)]
    if found.assumed:
        lines.append("assumed: neither names, shapes nor the file's metadata determine the field")
    lines += [f"note: {note}" for note in found.notes]
    rows = [("parameter", "in the file", "shape", "dtype", "norm")]
    for x in found.parameters:
        theirs = "" if x.theirs == x.name else x.theirs
        rows.append((x.name, theirs, "×".join(map(str, x.shape)), x.dtype, f"{x.norm:.4g}"))
    lines += table_lines(rows)
    if found.elsewhere:
        lines.append("other parts of the model:")
        lines += [f"  {stem}: {number} arrays" for stem, number in sorted(found.elsewhere.items())]
    if report.ignored:
        lines.append(f"entries that are not arrays with names: {_some(report.ignored)}")
    return "\n".join(lines)


def _config_lines(config: dict[str, Any], assumed: Sequence[str], prefix: str = "") -> list[str]:
    lines = []
    for name, x in config.items():
        path = f"{prefix}{name}"
        if isinstance(x, dict):
            lines += _config_lines(x, assumed, f"{path}.")
        else:
            lines.append(f"{path} = {x}" + (" (assumed)" if path in assumed else ""))
    return lines


def _compare(args: argparse.Namespace) -> int:
    with _progress() as progress:
        report = compare(
            *args.files,
            dialect_a=args.dialect_a,
            dialect_b=args.dialect_b,
            root_a=args.root_a,
            root_b=args.root_b,
            progress=progress,
        )
    if args.json:
        values = dataclasses.asdict(report)
        del values["module"]
        values["parameters"] = [{name: x for name, x in row.items() if x is not None} for row in values["parameters"]]
        print(json.dumps(values, indent=1))
    else:
        print(_comparison(report))
    return 0 if report.same else 1


def _comparison(report: Comparison) -> str:
    lines = [_place(place, report.module) for place in report.files]
    lines += [f"{name} differs: {a!r} and {b!r}" for name, (a, b) in report.config.items()]
    lines += [_difference(row) for row in report.parameters if not row.same]
    number = len(report.parameters)
    differing = sum(not row.same for row in report.parameters)
    lines.append(
        f"the same function: {number} parameters, number for number"
        if report.same
        else f"not the same parameters: {differing} of {number} parameters and {len(report.config)} settings differ"
    )
    return "\n".join(lines)


def _place(place: Place, module: str) -> str:
    return f"{place.file}: {_module(module, place.dialect, place.root)}"


def _module(module: str, dialect: str, root: str) -> str:
    return f"{module} of {find_dialect(dialect).title}" + (f" at {root}" if root else "")


def _difference(row: ParameterComparison) -> str:
    if row.shapes is not None:
        a, b = ("absent" if shape is None else list(shape) for shape in row.shapes)
        return f"{row.name} differs in shape: {a} and {b}"
    return f"{row.name} differs by {row.difference:.3g}, {row.relative:.2g} of its largest value in the second file"


if __name__ == "__main__":
    sys.exit(main())
