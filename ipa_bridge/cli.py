"""The command `ipa-port`: weight files from one system to another, what is in them, and whether two are the same."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ipa_bridge import semantics
from ipa_bridge.config import PredictedLDDTConfig, attention_of, replace_attention
from ipa_bridge.console import as_command
from ipa_bridge.conversion import LOSSES, express, in_layout
from ipa_bridge.dialects import DIALECTS, KINDS, Dialect, Found, Parts, modules, named
from ipa_bridge.files import SUFFIXES, ArrayFile, check_destination, open_arrays
from ipa_bridge.parameters import parameter_shapes
from ipa_bridge.told import functional
from ipa_bridge.version import __version__
from ipa_bridge.weights import Weights, in_dialect, read_module, slashed

DTYPES = ("float32", "float64", "bfloat16", "float16")

EXAMPLES = """\
examples:
  ipa-port inspect params_model_1.npz
  ipa-port convert params_model_1.npz openfold.pt --to openfold --verify
  ipa-port compare params_model_1.npz openfold.pt
"""

VERIFIED_WITHIN = 1024
"""Units of eps of float64; what only orders numbers anew stays below ten, a swapped axis is at 1e14."""


@as_command
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 0 if all is well, 1 if files differ or a conversion does not hold, 2 if it cannot be done."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError) as error:
        print(f"ipa-port {args.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ipa-port", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"ipa-twins {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    dialects = ", ".join(DIALECTS)

    convert = commands.add_parser("convert", help="write a module's weights as another system's")
    convert.add_argument("source", metavar="SRC", help=f"weights: {', '.join(SUFFIXES)}")
    convert.add_argument("destination", metavar="DST", help="where to; the suffix says the format")
    convert.add_argument(
        "--from", dest="source_dialect", choices=DIALECTS, metavar="DIALECT", help=f"of SRC: {dialects}"
    )
    convert.add_argument(
        "--to",
        choices=DIALECTS,
        metavar="DIALECT",
        help="of DST (default: ours, in AlphaFold's haiku names for .npz and in torch's for others)",
    )
    convert.add_argument("--root", help="path of the module in SRC, where there are several or another is meant")
    convert.add_argument("--to-root", metavar="PATH", help="path of the module in DST (default: the module alone)")
    convert.add_argument("--dtype", choices=DTYPES, help="round to it (default: as they are)")
    convert.add_argument(
        "--allow-lossy",
        type=lambda text: text.split(","),
        default=[],
        metavar="LOSS[,LOSS…]",
        help=f"what may be lost, of {', '.join(LOSSES)}",
    )
    convert.add_argument("--verify", action="store_true", help="run both files' semantics on random input")
    convert.add_argument("--force", action="store_true", help="replace DST if it exists")
    convert.set_defaults(run=_convert)

    inspect = commands.add_parser("inspect", help="what is in a file")
    inspect.add_argument("file", metavar="FILE")
    inspect.add_argument("--dialect", choices=DIALECTS, metavar="DIALECT", help=f"whose it is: {dialects}")
    inspect.add_argument("--root", help="path of the module")
    inspect.set_defaults(run=_inspect)

    compare = commands.add_parser("compare", help="whether two files hold the same function")
    compare.add_argument("files", nargs=2, metavar="FILE")
    for letter in "ab":
        compare.add_argument(
            f"--dialect-{letter}", choices=DIALECTS, metavar="DIALECT", help=f"of file {letter.upper()}"
        )
        compare.add_argument(f"--root-{letter}", metavar="PATH", help=f"path of the module in file {letter.upper()}")
    compare.set_defaults(run=_compare)

    for command in (convert, inspect, compare):
        command.add_argument("--json", action="store_true", help="for machines")
    return parser


def _convert(args: argparse.Namespace) -> int:
    destination = Path(args.destination)
    _check_destination(destination, Path(args.source), args.force)
    target = named(args.to or ("ipa_jax" if destination.suffix == ".npz" else "ipa_torch"))
    with open_arrays(args.source) as file:
        weights, found, parts = _read(file, args.source_dialect, args.root)
        elsewhere, ignored = _elsewhere(file, parts), list(file.ignored)
    as_read, whose = weights, _whose(found, weights)
    if args.dtype:
        weights = weights.astype(args.dtype)
    expressed = express(weights, target, allow_lossy=args.allow_lossy)
    root = _root(args.to_root, target, expressed.weights)
    notes = [*parts.notes(), *expressed.notes]
    if not target.forms:
        notes += [f"{destination.name} {text}" for text in expressed.weights.forgotten(destination)]
    if found.dialect.frames and not target.frames:
        notes.append(found.dialect.frames)
    notes += weights.unsure()
    added = list(target.unused.get(found.kind, {}))
    report: dict[str, Any] = {
        "source": {"file": args.source, "dialect": whose.name, "root": found.root},
        "destination": {"file": args.destination, "dialect": target.name, "root": root},
        "module": KINDS[found.kind],
        "config": dataclasses.asdict(expressed.weights.config),
        "converted": len(expressed.weights.arrays),
        "numbers": sum(x.size for x in expressed.weights.arrays.values()),
        "added": added,
        "assumed": sorted(expressed.weights.assumed),
        "losses": [loss._asdict() for loss in expressed.losses],
        "notes": notes,
        "elsewhere": elsewhere,
        "ignored": ignored,
    }
    verified = True
    if args.verify:
        report["verified"] = _verify(as_read, found, args.dtype, target, args.allow_lossy)
        verified = bool(report["verified"]["passed"])
    if verified:
        expressed.weights.write(destination, target, root=root, replace=args.force)
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        print(_conversion(report, whose, target, destination, verified))
    return 0 if verified else 1


def _root(asked: str | None, target: Dialect, weights: Weights) -> str:
    """The path in the destination; a prefix may be given with its dot."""
    if asked is None:
        return weights.root if target.separator == "/" else ""
    root = asked.rstrip("./")
    if root and ("" in root.split(target.separator) or root.strip() != root):
        raise ValueError(f"--to-root must be names with {target.separator!r} between them; got {asked!r}")
    return root


def _check_destination(destination: Path, source: Path, force: bool) -> None:
    if destination.suffix not in SUFFIXES:
        raise ValueError(f"{destination}: expected a name ending in {', '.join(SUFFIXES)}")
    if source.exists() and destination.exists() and destination.samefile(source):
        raise ValueError(f"{destination} is the source itself: name another file")
    try:
        check_destination(destination, replace=force)
    except ValueError as error:
        raise ValueError(f"{error}; --force replaces an ordinary file") from None
    if not destination.parent.is_dir():
        raise ValueError(f"{destination}: there is no directory {destination.parent}")


def _read(file: ArrayFile, dialect: str | None, root: str | None) -> tuple[Weights, Found, Parts]:
    progress = _Progress(f"reading {file.path.name}")
    try:
        return read_module(file, dialect=dialect, root=root, progress=progress)
    finally:
        progress.clear()


def _elsewhere(file: ArrayFile, parts: Parts) -> dict[str, int]:
    """Arrays that belong to other parts of the model, counted by the first names of their paths."""
    keys = slashed(file.keys)
    names = parts.found.names(keys)
    here = {*parts.read, *(names[name] for name in parts.unused)}
    return dict(Counter(_stem(key) for key in keys if key not in here))


def _stem(key: str) -> str:
    separator = "/" if "/" in key else "."
    parts = key.split(separator)
    return separator.join(parts[: min(3, max(1, len(parts) - 1))])


def _verify(
    weights: Weights, found: Found, dtype: str | None, target: Dialect, allow_lossy: Sequence[str]
) -> dict[str, Any]:
    """The source's semantics and the target's on the same random input, each against ours in float64.

    What rounding and losses change is measured apart: from what was read to what is written, both in our semantics.
    """
    weights = _without_zeros(weights)
    written = express(weights.astype(dtype) if dtype else weights, target, allow_lossy=allow_lossy).weights
    before, after = (semantics.probe("ipa_jax", each.arrays, each.config) for each in (weights, written))
    source = semantics.probe(found.dialect.name, in_dialect(weights, found.dialect, ""), weights.config)
    result = semantics.probe(target.name, in_dialect(written, target, ""), written.config)
    eps = float(np.finfo(np.float64).eps)
    errors = [semantics.distance(source, before) / eps, semantics.distance(result, after) / eps]
    change = semantics.distance(after, before)
    finite = all(map(math.isfinite, (*errors, change)))
    return {
        "eps": max(errors) if finite else None,
        "within": VERIFIED_WITHIN,
        "change": change if finite else None,
        "passed": finite and max(errors) <= VERIFIED_WITHIN,
    }


def _without_zeros(weights: Weights) -> Weights:
    """The same with random numbers where a whole projection is zero, as in a model that has not been trained.

    Nothing passes through zeros, and any two functions that end in them are the same.
    """
    filling = Weights.random(weights.config).arrays
    arrays = {
        name: filling[name].astype(x.dtype) if name.endswith("/weights") and not x.any() else x
        for name, x in weights.arrays.items()
    }
    return dataclasses.replace(weights, arrays=arrays)


def _conversion(report: dict[str, Any], source: Dialect, target: Dialect, destination: Path, written: bool) -> str:
    where = f" at {report['source']['root']}" if report["source"]["root"] else ""
    lines = [
        f"{report['source']['file']}: {source.title}'s {report['module']}{where}",
        f"{destination}: {target.title}'s, {report['converted']} parameters, {report['numbers']:,} numbers",
    ]
    if report["added"]:
        lines.append(f"and zeros, which {target.title} never reads: {', '.join(report['added'])}")
    lines += [f"lost, as allowed: {loss['name']}: {loss['reason']}" for loss in report["losses"]]
    lines += [f"mind: {note}" for note in report["notes"]]
    if report["elsewhere"]:
        others = ", ".join(f"{stem} ({number})" for stem, number in sorted(report["elsewhere"].items())[:8])
        more = len(report["elsewhere"]) - 8
        lines.append(
            f"left, for they belong to other parts of the model: {sum(report['elsewhere'].values())} arrays: {others}"
            + (f" and {more} more places" if more > 0 else "")
        )
    if report["ignored"]:
        lines.append(f"left, for they are no arrays by name: {_some(report['ignored'])}")
    if "verified" in report:
        v = report["verified"]
        if v["eps"] is None:
            lines.append("verified on random input: outputs overflow, NOTHING CAN BE SAID")
        else:
            verdict = "the same function as the file's names mean" if v["passed"] else "NOT THE SAME FUNCTION"
            lines.append(f"verified on random input: within {v['eps']:.1f} eps of float64: {verdict}")
            if v["change"] > VERIFIED_WITHIN * float(np.finfo(np.float64).eps):
                lines.append(f"what was lost or rounded changes outputs by {v['change']:.1e} of the largest")
    if not written:
        lines.append("nothing was written")
    return "\n".join(lines)


def _some(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _inspect(args: argparse.Namespace) -> int:
    with open_arrays(args.file) as file:
        keys = slashed(file.keys)
        haiku = any("//" in key for key in file.keys)
        every = modules(keys, args.dialect, haiku=haiku)
        report: dict[str, Any] = {
            "file": args.file,
            "arrays": len(keys),
            "ignored": list(file.ignored),
            "modules": [
                {"module": KINDS[each.kind], "root": each.root, "dialect": each.dialect.name} for each in every
            ],
        }
        try:
            weights, found, parts = _read(file, args.dialect, args.root)
        except ValueError as error:
            report["problem"] = str(error)
        else:
            report |= {
                "module": KINDS[found.kind],
                "root": found.root,
                "dialect": _whose(found, weights).name,
                "config": dataclasses.asdict(weights.config),
                "assumed": sorted(weights.assumed),
                "notes": parts.notes(),
                "parameters": [
                    {
                        "name": name,
                        "theirs": theirs,
                        "shape": list(transform.their_shape),
                        "dtype": weights.arrays[name].dtype.name,
                        "norm": float(np.linalg.norm(weights.arrays[name].astype(np.float64))),
                    }
                    for name, (theirs, transform) in found.dialect.names(weights.config).items()
                ],
                "elsewhere": _elsewhere(file, parts),
            }
    print(json.dumps(report, indent=1) if args.json else _contents(report))
    return 2 if "problem" in report else 0


def _whose(found: Found, weights: Weights) -> Dialect:
    """AlphaFold's names are ours too; they are AlphaFold's if its own classes compute this."""
    if found.dialect.separator != "/":
        return found.dialect
    try:
        same = express(weights, named("alphafold")).weights.config == weights.config
    except ValueError:
        same = False
    return named("alphafold" if same else "ipa_jax")


def _contents(report: dict[str, Any]) -> str:
    lines = [f"{report['file']}: {report['arrays']} arrays"]
    places: dict[tuple[str, str], list[str]] = {}
    for each in report["modules"]:
        places.setdefault((each["module"], each["root"]), []).append(each["dialect"])
    lines += [f"  {module} at {root or 'the top'}: {' or '.join(whose)}" for (module, root), whose in places.items()]
    if "problem" in report:
        return "\n".join([*lines, report["problem"]])
    lines += [
        f"{named(report['dialect']).title}'s {report['module']}" + (f" at {report['root']}" if report["root"] else "")
    ]
    lines += [f"  {line}" for line in _config_lines(report["config"], report["assumed"])]
    if report["assumed"]:
        lines.append("assumed fields are those that neither names nor shapes nor the file's metadata tell")
    lines += [f"mind: {note}" for note in report["notes"]]
    rows = [("parameter", "in the file", "shape", "dtype", "norm")]
    for x in report["parameters"]:
        theirs = "" if x["theirs"] == x["name"] else x["theirs"]
        rows.append((x["name"], theirs, "×".join(map(str, x["shape"])), x["dtype"], f"{x['norm']:.4g}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if report["elsewhere"]:
        lines.append("other parts of the model:")
        lines += [f"  {stem}: {number} arrays" for stem, number in sorted(report["elsewhere"].items())]
    if report["ignored"]:
        lines.append(f"no arrays by name: {_some(report['ignored'])}")
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
    read = []
    for path, dialect, root in zip(
        args.files, (args.dialect_a, args.dialect_b), (args.root_a, args.root_b), strict=True
    ):
        with open_arrays(path) as file:
            read.append(_read(file, dialect, root)[:2])
    (a, found_a), (b, found_b) = read
    if found_a.kind is not found_b.kind:
        raise ValueError(
            f"one kind of module was expected in both; got {KINDS[found_a.kind]} in {args.files[0]} and "
            f"{KINDS[found_b.kind]} in {args.files[1]}: name a module in one of them with --root-a or --root-b, as "
            f"`ipa-port inspect` lists them"
        )
    one, other = (_common(weights) for weights in (a, b))
    configs = [functional(weights.config) for weights in (one, other)]
    differing = {
        name: [config.get(name) for config in configs]
        for name in dict.fromkeys(name for config in configs for name in config)
        if configs[0].get(name) != configs[1].get(name)
    }
    rows = []
    for name in dict.fromkeys([*one.arrays, *other.arrays]):
        x, y = (weights.arrays.get(name) for weights in (one, other))
        if x is None or y is None or x.shape != y.shape:
            shapes = [None if z is None else list(z.shape) for z in (x, y)]
            rows.append({"name": name, "shapes": shapes, "same": False})
            continue
        x, y = (z.astype(np.float64) for z in (x, y))
        largest = float(np.abs(y).max())
        difference = float(np.abs(x - y).max())
        rows.append(
            {
                "name": name,
                "same": difference == 0,
                "difference": difference,
                "relative": difference / largest if largest else float(difference > 0),
            }
        )
    same = not differing and all(row["same"] for row in rows)
    report = {
        "files": [
            {"file": path, "dialect": found.dialect.name, "root": found.root}
            for path, (_, found) in zip(args.files, read, strict=True)
        ],
        "same": same,
        "config": differing,
        "parameters": rows,
    }
    print(json.dumps(report, indent=1) if args.json else _comparison(report, found_a, found_b))
    return 0 if same else 1


def _common(weights: Weights) -> Weights:
    """In the form that both of AlphaFold's layouts have a place in: monomer, with biases, zero where there are none."""
    if isinstance(weights.config, PredictedLDDTConfig):
        return weights
    weights = in_layout(weights, "monomer")
    ipa = dataclasses.replace(attention_of(weights.config), scalar_bias=True, point_bias=True)
    config = replace_attention(weights.config, ipa)
    arrays = {
        name: weights.arrays[name] if name in weights.arrays else np.zeros(shape, np.float32)
        for name, shape in parameter_shapes(config).items()
    }
    return Weights(arrays, config)


def _comparison(report: dict[str, Any], *found: Found) -> str:
    lines = [
        f"{x['file']}: {each.dialect.title}'s {KINDS[each.kind]}" + (f" at {each.root}" if each.root else "")
        for x, each in zip(report["files"], found, strict=True)
    ]
    lines += [f"{name} differs: {a!r} and {b!r}" for name, (a, b) in report["config"].items()]
    for row in report["parameters"]:
        if "shapes" in row:
            a, b = (shape or "nothing" for shape in row["shapes"])
            lines.append(f"{row['name']} differs: {a} and {b}")
        elif not row["same"]:
            lines.append(
                f"{row['name']} differs by {row['difference']:.3g}, {row['relative']:.2g} of its largest value"
            )
    number = len(report["parameters"])
    differing = sum(not row["same"] for row in report["parameters"])
    lines.append(
        f"the same function: {number} parameters, number for number"
        if report["same"]
        else f"not the same parameters: {differing} of {number} parameters and {len(report['config'])} settings differ"
    )
    return "\n".join(lines)


class _Progress:
    """A bar on standard error for what takes longer than a second."""

    def __init__(self, what: str, width: int = 30) -> None:
        self.what, self.width, self.started, self.drawn = what, width, time.perf_counter(), False

    def __call__(self, done: int, of: int) -> None:
        if time.perf_counter() - self.started < 1 or not sys.stderr.isatty():
            return
        full = self.width * done // max(of, 1)
        bar = "█" * full + "░" * (self.width - full)
        print(f"\r\033[K{self.what} {bar} {done}/{of}", end="", file=sys.stderr, flush=True)
        self.drawn = True

    def clear(self) -> None:
        if self.drawn:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
