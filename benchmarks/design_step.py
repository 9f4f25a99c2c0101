"""Time and peak memory of a design step of ColabDesign, before and after its attention is replaced by ours.

`python -m benchmarks.design_step --residues 128 256` needs an installed package colabdesign that runs on the installed
JAX. A step is a loss of AlphaFold's outputs (contacts, pLDDT and radius of gyration of a hallucinated chain) and its
gradient to the sequence, through the whole model in float32, with random parameters and few blocks of the Evoformer.
Nothing is printed unless loss and gradient agree before and after, as far as rounding determines them: the gradient of
such a model can move by thousands of epsilons if its parameters move by one. A third step, whose attention returns
zero, shows how much time is spent outside the attention.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

import ipa_jax
from benchmarks.calls import CompiledByJax
from benchmarks.clock import once
from benchmarks.memory import available, forget_peak, is_out_of_memory, resident
from benchmarks.report import NUMBER, TEXT, markdown_head, markdown_row, refuse, save, say
from ipa_bridge.tolerance import KINKED, bound

BEFORE, AFTER, WITHOUT = STEPS = ("before", "after", "without attention")

FOLDING = "colabdesign.af.alphafold.model.folding"
"""ColabDesign's module of the structure module; the multimer's has a name of its own."""

EPSILON = float(np.finfo(np.float32).eps)

RATIO, DRAWS = 3.0, 3
"""Largest difference allowed, over the largest that parameters moved by at most one epsilon make in so many draws."""

Result = tuple[float, np.ndarray]
"""Loss, and its gradient to the sequence."""


def main() -> int:
    """Checks parity, then measures. Returns the exit status: 1 if parity fails, or without ColabDesign."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.design_step", description=__doc__)
    parser.add_argument("--residues", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--blocks", type=int, default=1, help="blocks of the Evoformer and of its extra MSA stack")
    parser.add_argument("--multimer", action="store_true", help="the multimer's model instead of the monomer's")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", metavar="FILE", help="also write what was measured to this JSON file")
    parser.add_argument("--memory-of", choices=STEPS, help="measure the memory of this step alone, once")
    args = parser.parse_args()
    try:
        importlib.import_module("colabdesign")
    except ImportError as error:
        print(f"an installed package colabdesign was expected; got {error}: install it", file=sys.stderr)
        return 1
    if args.memory_of:
        # Beyond this limit an allocation fails, and the machine does not.
        resource.setrlimit(resource.RLIMIT_DATA, (available(), resource.RLIM_INFINITY))
        print(json.dumps(peak(args.memory_of, args.residues[0], args.blocks, args.multimer)))
        return 0
    rows: list[dict[str, Any]] = []
    for residues in args.residues:
        failures, row = measure(residues, args)
        if failures:
            refuse(failures)
            return 1
        rows.append(row)
        save({"blocks": args.blocks, "multimer": args.multimer, "rows": rows}, args.save)
    print(table(rows))
    return 0


def measure(residues: int, args: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """Comparisons that fail, and the seconds of all turns, the bytes and the differences of the steps."""
    calls = {}
    for step in STEPS:
        say(f"{residues} residues: compiling, {step}")
        calls[step] = prepare(step, residues, args.blocks, args.multimer)
    results = {step: read(call()) for step, call in calls.items()}
    apart = differences(results[BEFORE], results[AFTER])
    rounding = sensitivity(calls[BEFORE], results[BEFORE])
    row: dict[str, Any] = {"residues": residues, "apart": apart, "rounding": rounding}
    row["seconds"] = {step: [] for step in STEPS}
    if failures := list(gate(apart, rounding)):
        return failures, row
    for turn in range(args.repeats):
        say(f"{residues} residues: turn {turn + 1} of {args.repeats}")
        for step, call in calls.items():
            gc.collect()
            row["seconds"][step].append(once(call))
    del calls
    for step in (BEFORE, AFTER):
        say(f"{residues} residues: memory, {step}")
        row.setdefault("bytes", {})[step] = peak_in_own_process(step, residues, args)
    return [], row


def prepare(step: str, residues: int, blocks: int, multimer: bool) -> CompiledByJax:
    """A compiled call of ColabDesign's loss and its gradient to the sequence, on a random sequence."""
    design = importlib.import_module("colabdesign").mk_afdesign_model
    with contextlib.redirect_stdout(sys.stderr):  # it reports that it finds no published parameters
        model = design(
            protocol="hallucination",
            use_multimer=multimer,
            use_bfloat16=False,
            data_dir=os.devnull,
            loss_callback=radius_of_gyration,
        )
    stacks = model._cfg.model.embeddings_and_evoformer
    stacks.evoformer_num_block = stacks.extra_msa_stack_num_block = blocks
    model.prep_inputs(length=residues)
    model.restart(seed=0, mode="gumbel", weights={"plddt": 1.0, "con": 1.0})
    inputs = model._inputs | {
        "opt": model.opt,
        "prev": {
            "prev_msa_first_row": np.zeros((residues, 256), np.float32),
            "prev_pair": np.zeros((residues, residues, 128), np.float32),
            "prev_pos": np.zeros((residues, 37, 3), np.float32),
        },
    }
    key = jax.random.PRNGKey(0)
    params = random_params(model._model, model._params, inputs, key)
    with attention_of(step, multimer):
        return CompiledByJax(model._model["grad_fn"], *jax.device_put((model._params, params, inputs, key)))


def radius_of_gyration(outputs: Any) -> dict[str, jax.Array]:
    """A loss of coordinates, in Å: without one, no gradient passes through the frames."""
    ca = outputs["structure_module"]["final_atom_positions"][:, 1]
    return {"radius": jnp.sqrt(((ca - ca.mean(0)) ** 2).sum(-1).mean() + 1e-8)}


def random_params(functions: dict[str, Any], sequence: Any, inputs: Any, key: Any) -> Any:
    """Random parameters of ColabDesign's model; no output is left at zero."""
    runner, shapes = functions["runner"], []
    apply = runner.apply

    def capture(params: Any, key: Any, features: Any) -> Any:
        shapes.append(jax.eval_shape(runner.init, key, features))
        raise StopIteration

    runner.apply = capture
    with contextlib.suppress(StopIteration):
        jax.eval_shape(functions["fn"], sequence, {}, inputs, key)
    runner.apply = apply
    rng = np.random.default_rng(0)

    def draw(leaf: str, shape: tuple[int, ...]) -> np.ndarray:
        inputs = np.prod(shape[:-1]) if leaf == "output_w" else shape[0]
        spread = 0.05 if len(shape) < 2 else 1 / np.sqrt(inputs)
        return ((leaf == "scale") + spread * rng.standard_normal(shape)).astype(np.float32)

    return {path: {leaf: draw(leaf, x.shape) for leaf, x in leaves.items()} for path, leaves in shapes[0].items()}


@contextlib.contextmanager
def attention_of(step: str, multimer: bool) -> Iterator[None]:
    """ColabDesign's structure module has its own attention, ours or one that returns zero, until the block ends."""
    module: ModuleType = importlib.import_module(FOLDING + "_multimer" * multimer)
    if step == AFTER:
        with ipa_jax.replace_alphafold_ipa(modules=[module], verify=False):
            yield
        return
    own = module.InvariantPointAttention
    module.InvariantPointAttention = NoAttention if step == WITHOUT else own  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.InvariantPointAttention = own  # type: ignore[attr-defined]


class NoAttention(hk.Module):
    """Built and called as AlphaFold's attention; it returns zero."""

    def __init__(self, config: Any, global_config: Any) -> None:
        super().__init__()

    def __call__(self, inputs_1d: Any, **others: Any) -> Any:
        """Zeros in the shape of the activations."""
        return jnp.zeros_like(inputs_1d)


def read(result: Any) -> Result:
    """Loss and gradient of a step."""
    (loss, _), gradient = result
    return float(loss), np.asarray(gradient["seq"], np.float64)


def differences(before: Result, after: Result) -> dict[str, float]:
    """Differences of loss and gradient in epsilons of float32, Euclidean over the norm before."""
    found = {}
    for name, x, y in zip(("loss", "gradient"), before, after, strict=True):
        size = np.linalg.norm(np.asarray(x))
        found[name] = float(np.linalg.norm(np.asarray(y) - np.asarray(x)) / size / EPSILON) if size else np.inf
    return found


def sensitivity(call: CompiledByJax, result: Result) -> dict[str, float]:
    """The largest differences that a step makes by itself where each parameter moves by at most one epsilon."""
    sequence, params, inputs, key = call.inputs
    rng = np.random.default_rng(1)

    def moved(x: Any) -> np.ndarray:
        return (np.asarray(x) * (1 + EPSILON * rng.choice([-1, 0, 1], x.shape))).astype(np.float32)

    draws = [read(call.compiled(sequence, jax.tree.map(moved, params), inputs, key)) for _ in range(DRAWS)]
    found = [differences(result, x) for x in draws]
    return {name: max(x[name] for x in found) for name in found[0]}


def gate(apart: dict[str, float], rounding: dict[str, float]) -> Iterator[str]:
    """Differences beyond their bounds."""
    for name, x in apart.items():
        largest = KINKED * bound(name, "float32")
        allowed = min(RATIO * rounding[name] + bound(name, "float32"), largest)
        if not x <= allowed:
            yield f"{name}: {x:.3g} eps apart, at most {allowed:.3g} allowed"


def peak(step: str, residues: int, blocks: int, multimer: bool) -> int:
    """Peak bytes of a step above those resident before it."""
    call = prepare(step, residues, blocks, multimer)
    gc.collect()
    forget_peak()
    before = resident("VmRSS")
    result = call()
    after = resident("VmHWM")
    del result
    return after - before


def peak_in_own_process(step: str, residues: int, args: argparse.Namespace) -> int | None:
    """The result of `peak` in a fresh process; None where there is not enough memory."""
    command = [sys.executable, "-m", "benchmarks.design_step", "--memory-of", step, "--residues", str(residues)]
    command += ["--blocks", str(args.blocks), *(["--multimer"] if args.multimer else [])]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    if run.returncode:
        if run.returncode < 0 or is_out_of_memory(run.stderr):
            return None
        raise RuntimeError(f"{' '.join(command[2:])} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of medians and least seconds, of memory, and of the ratios after to before."""
    columns = [f"{step}: s (least)" for step in STEPS] + [f"{step}: MiB" for step in (BEFORE, AFTER)]
    ratios = ("time, after/before (range)", "memory, after/before", "gradient apart, eps (by rounding)")
    lines = markdown_head(("residues", NUMBER), *((x, NUMBER) for x in columns), *((x, TEXT) for x in ratios))
    for row in rows:
        seconds, room = row["seconds"], row["bytes"]
        cells = [f"{statistics.median(seconds[step]):.2f} ({min(seconds[step]):.2f})" for step in STEPS]
        cells += ["does not fit" if x is None else f"{x / 2**20:.0f}" for x in room.values()]
        turns = [y / x for x, y in zip(seconds[BEFORE], seconds[AFTER], strict=True)]
        cells.append(f"{statistics.median(turns):.2f} ({min(turns):.2f}–{max(turns):.2f})")
        cells.append(f"{room[AFTER] / room[BEFORE]:.2f}" if room[AFTER] and room[BEFORE] else "–")
        cells.append(f"{row['apart']['gradient']:.0f} ({row['rounding']['gradient']:.0f})")
        lines.append(markdown_row((row["residues"], *cells)))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
