"""Writes test vectors of invariant point attention, for programs in any language: the command `ipa-parity vectors`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ipa_bridge.config import IPAConfig
from ipa_bridge.console import Progress
from ipa_bridge.proteins import load_structure
from ipa_bridge.weights.dialects import DIALECTS
from ipa_parity.attention.cases import PRESETS, load_weights
from ipa_parity.vectors.writing import write_vectors

EXAMPLES = """\
examples:
  ipa-parity vectors vectors --preset alphafold2
  ipa-parity vectors vectors --weights params_model_1.npz --structure 1gcn.pdb --parameters openfold
  ipa-parity check --outputs mine --vectors vectors    (judges what your program made of them)
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command. Returns 0, or 2 for wrong arguments."""
    args = _parser().parse_args(argv)
    progress = Progress(shown=not args.quiet)
    try:
        weights = load_weights(args.weights, args.preset) if args.weights else None
        config = PRESETS[args.preset or "alphafold2"]() if weights is None else weights.config
        if not isinstance(config, IPAConfig):
            raise ValueError(
                f"{args.weights}: an attention or a structure module was expected; it holds another module"
            )
        write_vectors(
            Path(args.folder),
            config,
            seed=args.seed,
            weights=weights,
            structure=load_structure(args.structure) if args.structure else None,
            parameters=args.parameters,
            progress=progress,
        )
    except (ValueError, OSError, ImportError) as error:
        progress.clear()
        print(f"ipa-parity vectors: {error}", file=sys.stderr)
        return 2
    progress.clear()
    print(f"{args.folder}: see its README.md")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ipa-parity vectors",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", help="a folder that does not exist or is empty")
    parser.add_argument("--preset", choices=PRESETS, help="the config (default: alphafold2, or that of --weights)")
    parser.add_argument("--weights", metavar="FILE", help="the weights: .npz, .safetensors or .pt (default: seeded)")
    parser.add_argument("--structure", metavar="FILE", help="a protein to add: PDB or mmCIF")
    parser.add_argument("--seed", type=_seed, default=0, help="seed of all random numbers (default: %(default)s)")
    parser.add_argument(
        "--parameters", metavar="DIALECT", choices=DIALECTS, help=f"names of the parameters: {', '.join(DIALECTS)}"
    )
    parser.add_argument("--quiet", action="store_true", help="print no progress on standard error")
    return parser


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number from 0; got {text!r}")
    return int(text)
