"""The float32 error of the streamed attention beside that of the reference; the truth is the reference in float64.

`python -m benchmarks.accuracy --structure protein.pdb` prints Euclidean errors of the whole module's output and
gradients, over the Euclidean norm of the values, in eps. Of the gradients it prints the one with the highest ratio.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from benchmarks.report import NUMBER, TEXT, markdown_head, markdown_row
from ipa_bridge import tolerance
from ipa_bridge.config import IPAConfig
from ipa_bridge.proteins import load_structure
from ipa_parity.attention.cases import Case, make_case
from ipa_parity.attention.stages import RUNNERS


def main() -> int:
    """Prints a table. Returns 1 if streaming errs over twice (in a gradient three times) as much as the reference."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--residues", type=int, default=256, help="number of random frames (default: %(default)s)")
    parser.add_argument("--structure", nargs="*", default=[], metavar="FILE", help="proteins to add, as PDB or mmCIF")
    args = parser.parse_args()
    of_text, of_numbers = ("case", "framework", "what"), ("streamed", "reference", "ratio")
    print(*markdown_head(*((x, TEXT) for x in of_text), *((x, NUMBER) for x in of_numbers)), sep="\n")
    passed = True
    for make in cases(args.residues, args.structure):
        case = make().astype("float32")
        for framework, run in RUNNERS.items():
            print(f"{case.name}, {framework}", file=sys.stderr, flush=True)
            exact = run(case.astype("float64"), implementation="reference")
            errors = {}
            for implementation in ("streamed", "reference"):
                found = run(case, implementation=implementation)
                errors[implementation] = {
                    stage: np.linalg.norm(found[stage] - x) / np.linalg.norm(x) / tolerance.epsilon("float32")
                    for stage, x in exact.items()
                    if (stage == "out" or stage.startswith("gradient/")) and stage != "gradient/attention_2d/bias"
                }
            ratios = {s: e / (errors["reference"][s] + 1) for s, e in errors["streamed"].items()}
            worst = max((s for s in ratios if s != "out"), key=lambda s: ratios[s])
            for stage in ("out", worst):
                streamed, reference = (errors[name][stage] for name in ("streamed", "reference"))
                numbers = (f"{streamed:.1f}", f"{reference:.1f}", f"{streamed / reference:.2f}")
                print(markdown_row((case.name, framework, stage, *numbers)), flush=True)
            passed &= bool(ratios["out"] <= 2 and ratios[worst] <= 3)
    return 0 if passed else 1


def cases(residues: int, structures: list[str]) -> Iterator[Callable[[], Case]]:
    """Cases of AlphaFold 2's sizes: random frames close together, far apart and far from the origin, and proteins."""
    config, shape = IPAConfig.alphafold2(), (residues,)
    yield partial(make_case, "random frames", config, shape)
    yield partial(make_case, "spread ±100", config, shape, spread=100.0, cluster=4)
    yield partial(make_case, "offset 1000", config, shape, offset=1000.0)
    for path in structures:
        structure = load_structure(path)
        name = f"{path.rpartition('/')[-1]}, {len(structure)} residues"
        yield partial(make_case, name, config, structure=structure)


if __name__ == "__main__":
    sys.exit(main())
