"""Time and peak memory of the attention on a GPU: ours, the textbook, compiled or not, and published classes.

    python -m benchmarks.gpu [--residues 256 1024 …] [--pair float32 bfloat16] [--json] [--save FILE] [--plot FILE]

AlphaFold 2's sizes. Systems take turns in one process, below 4096 residues; a PyTorch call is timed by the GPU's own
events, a JAX call by the clock over several of them. "core" is `point_attention`, "module" the whole class with its
projections. Shares are of what the necessary passes over the pair would take at the bandwidth of a plain copy, measured
in the same run: one reading forwards; another and one writing backwards. What needs more memory than there is, is left
out.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two frameworks share one memory

import numpy as np

from benchmarks.systems import BACKWARD, DIRECTIONS, FORWARD
from ipa_bridge.config import Implementation, IPAConfig
from ipa_parity import peers
from ipa_parity.attention import jax_point_attention
from ipa_parity.cases import make_case
from ipa_parity.report import compare

RESIDUES = (256, 512, 1024, 2048, 4096, 8192)
PAIRS = ("float32", "bfloat16", "none")

TARGETS = {
    ("float32", 1024): (170, 350),
    ("float32", 2048): (670, 1400),
    ("bfloat16", 1024): (95, 200),
    ("bfloat16", 2048): (350, 750),
}
"""Microseconds forwards, and backwards beside that, that the fused core is to take on an H200."""


class Case(NamedTuple):
    """What is measured."""

    residues: int
    pair: str
    """Its dtype, or "none"."""
    device: str


ALONE_FROM = 4096
"""Residues from which systems are timed one after the other: several would not fit beside each other."""

Call = Callable[[], Any]


class System(NamedTuple):
    """Its calls by direction, made ready on a case."""

    name: str
    kind: str
    """core or module."""
    prepare: Callable[[Case], dict[str, Call]]
    pairs: tuple[str, ...] = PAIRS


def main() -> int:
    """Runs the gate, then measures; 1 if the gate fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--residues", type=int, nargs="+", default=RESIDUES)
    parser.add_argument("--pair", choices=PAIRS, nargs="+", default=PAIRS, help="its dtype")
    parser.add_argument("--system", nargs="+", metavar="NAME", help="only these (default: all)")
    parser.add_argument("--repeats", type=int, default=11, help="turns of each; medians are shown (default: 11)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries the command out")
    parser.add_argument("--json", action="store_true", help="print everything that was measured as JSON")
    parser.add_argument("--save", metavar="FILE", help="write that JSON to a file too")
    parser.add_argument("--plot", metavar="FILE", help="draw time and memory over residues, float32 pair")
    args = parser.parse_args()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("a CUDA device was expected, and PyTorch sees none; --device cpu tries the command out")
    systems, absent = available(args.device)
    if args.system and not set(args.system) <= {s.name for s in systems}:
        parser.error(f"--system must be among {[s.name for s in systems]}; got {args.system}")
    systems = [s for s in systems if args.system is None or s.name in args.system]
    failures = list(gate(args.device))
    if failures:
        print("parity fails, so there is no speed to speak of:", *failures, sep="\n  ", file=sys.stderr)
        return 1
    machine = {"device": args.device, "absent": absent, **bandwidth(args.device)}
    rows: list[dict] = []
    for residues in args.residues:
        for pair in args.pair:
            rows += measure(systems, Case(residues, pair, args.device), args.repeats, machine["bytes"])
            if args.save:  # as it grows: the next may be more than the machine bears
                Path(args.save).write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    if args.plot:
        from benchmarks import plot

        plot.save([row for row in rows if row["pair"] == "float32"], args.plot)
    print(json.dumps({"machine": machine, "rows": rows}, indent=1) if args.json else table(rows, machine))
    return 0


def available(device: str) -> tuple[list[System], list[str]]:
    """What can be measured here, and what cannot for want of a package or a GPU."""
    has = {name: importlib.util.find_spec(name) is not None for name in ("jax", "haiku", "alphafold", "transformers")}
    systems, absent = [], []
    for implementation in ("fused", "streamed"):
        if implementation == "streamed" or can_fuse(device):
            systems.append(System(f"torch, {implementation}", "core", partial(torch_core, implementation)))
            if device == "cuda":
                captured = partial(in_graphs, partial(torch_core, implementation))
                systems.append(System(f"torch, {implementation}, CUDA graph", "core", captured))
        else:
            absent.append("fused: no GPU")
    systems.append(System("torch, textbook", "core", partial(torch_core, "reference")))
    systems.append(System("torch, textbook, compiled", "core", compiled_textbook))
    systems.append(System("torch, scaled_dot_product_attention", "core", torch_sdpa, ("none",)))
    if has["jax"]:
        for implementation in ("fused", "streamed", "reference"):
            if implementation != "fused" or can_fuse(device):
                name = {"reference": "textbook"}.get(implementation, implementation)
                systems.append(
                    System(f"JAX, {name} (jit)", "core", partial(jax_core, cast(Implementation, implementation)))
                )
    else:
        absent.append("JAX: no package jax")
    systems.append(System("ipa_torch", "module", partial(torch_module, "fused" if can_fuse(device) else "streamed")))
    if has["transformers"]:
        systems.append(System("ESMFold", "module", esmfold, ("float32",)))
    else:
        absent.append("ESMFold: no package transformers")
    if has["jax"] and has["haiku"]:
        name = "fused" if can_fuse(device) else "streamed"
        systems.append(System("ipa_jax (jit)", "module", partial(jax_module, name), ("float32", "bfloat16")))
    else:
        absent.append("ipa_jax's module: no packages jax and haiku")
    if has["jax"] and has["haiku"] and has["alphafold"]:
        systems.append(System("AlphaFold (jit)", "module", partial(jax_module, "alphafold"), ("float32",)))
    else:
        absent.append("AlphaFold: no packages alphafold and haiku")
    return systems, absent


def can_fuse(device: str) -> bool:
    """Whether the kernels run there: on a CPU with TRITON_INTERPRET=1, in the interpreters."""
    return device == "cuda" or interpreted()


def interpreted() -> bool:
    """True where Triton interprets its kernels; both twins' fused attentions are told then."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    from ipa_torch.attention import fused

    fused.INTERPRETED = True
    if importlib.util.find_spec("jax"):
        jax_point_attention()
        fused_in_jax: Any = importlib.import_module("ipa_jax.attention.fused")
        fused_in_jax.INTERPRETED = True
    return True


def gate(device: str) -> Iterator[str]:
    """Comparisons of the cores' outputs with the textbook in float64 that are out of their bounds."""
    import torch

    for pair in ("float32", "bfloat16"):
        residues = 304 if device == "cuda" else 8
        arrays = torch_inputs(Case(residues, pair, device))
        wide = {name: None if x is None else x.detach().double() for name, x in arrays.items()}
        expected = [x.cpu().numpy() for x in torch_attend(wide, "reference")]
        for implementation in ("fused", "streamed") if can_fuse(device) else ("streamed",):
            found = {"torch": [x.detach().double().cpu().numpy() for x in torch_attend(arrays, implementation)]}
            if importlib.util.find_spec("jax"):
                of_jax = jax_core(implementation, Case(residues, pair, device))[FORWARD]()
                found["JAX"] = [np.asarray(x, np.float64) for x in of_jax if x is not None]
            for framework, outputs in found.items():
                for x, e in zip(outputs, expected, strict=True):
                    row = compare(
                        x,
                        e,
                        case=f"{pair} pair",
                        stage="out",
                        dtype="float32",
                        subject=f"{framework}, {implementation}",
                        reference="textbook in float64",
                    )
                    if not row.passed:
                        yield str(row)
    torch.cuda.empty_cache()


def bandwidth(device: str) -> dict[str, Any]:
    """Bytes a second of a plain copy, read and written; and what the device is."""
    import torch

    source = torch.empty(1 << (30 if device == "cuda" else 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = [torch_seconds(lambda: target.copy_(source), device) for _ in range(9)]
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {"bytes": 2 * source.numel() / statistics.median(copies[2:]), "name": name, "torch": torch.__version__}


def measure(systems: list[System], case: Case, repeats: int, copied: float) -> list[dict]:
    """Medians of turns in which every system is called once."""
    rows = []
    width = IPAConfig.alphafold2().pair_channel or 0
    size = case.residues**2 * width * {"float32": 4, "bfloat16": 2, "none": 0}[case.pair]
    for direction in DIRECTIONS:
        seconds: dict[str, list[float]] = {}
        found = [s for s in systems if case.pair in s.pairs]
        peaks = {system.name: peak(system, case, direction) for system in found}  # first, each alone
        together = [found] if case.residues < ALONE_FROM else [[system] for system in found]
        for some in together:
            seconds |= in_turn([s for s in some if peaks[s.name] is not None], case, direction, repeats)
        passes = 3 if direction == BACKWARD else 1
        for system in found:
            times = seconds.get(system.name)
            row = {
                "system": system.name,
                "kind": system.kind,
                "residues": case.residues,
                "pair": case.pair,
                "direction": direction,
                "seconds": statistics.median(times) if times else None,
                "times": times,
                "bytes": peaks[system.name],
                "pair_bytes": size,
                "share": passes * size / copied / statistics.median(times) if times and size else None,
            }
            rows.append(row)
    return rows


def in_turn(systems: list[System], case: Case, direction: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of every turn, by system; none of what finds no memory beside the others."""
    ready = {system.name: attempt(partial(prepared, system, case, direction)) for system in systems}
    seconds: dict[str, list[float]] = {name: [] for name, call in ready.items() if call is not None}
    for _ in range(repeats):
        for name in list(seconds):
            of_jax = name.startswith(("JAX", "ipa_jax", "AlphaFold"))
            took = attempt(partial(jax_seconds if of_jax else partial(torch_seconds, device=case.device), ready[name]))
            if took is None:
                del seconds[name]
            else:
                seconds[name].append(took)
    ready.clear()
    clean()
    return seconds


def attempt(call: Callable[[], Any]) -> Any:
    """What it returns; None where there is not enough memory."""
    try:
        return call()
    except (MemoryError, RuntimeError) as error:  # PyTorch's, XLA's, CUDA's and the CPU allocator's
        words = ("resource_exhausted", "out of memory", "alloc_failed", "defaultcpuallocator")
        if not isinstance(error, MemoryError) and not any(word in str(error).lower() for word in words):
            raise
    clean()  # now that nobody holds what the failed call had
    return None


def prepared(system: System, case: Case, direction: str) -> Call:
    """A call that was made once: what is compiled or captured at first use is."""
    call = system.prepare(case)[direction]
    call()
    return call


def clean() -> None:
    """Lets go of memory that nobody holds."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def peak(system: System, case: Case, direction: str) -> int | None:
    """Bytes above the inputs: as PyTorch's allocator saw, or as XLA planned; None where there are not enough."""
    import torch

    call = attempt(partial(prepared, system, case, direction))
    if call is None:
        return None
    if isinstance(call, CompiledByJax):
        return call.planned_bytes or 0
    if isinstance(call, Captured) or case.device == "cpu":  # a graph keeps what the call needs, which is told beside it
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    found = torch.cuda.max_memory_allocated() - before
    del result, call
    clean()
    return found


def torch_seconds(call: Call, device: str) -> float:
    """By the GPU's events; on a CPU by the clock."""
    import torch

    if device == "cpu":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    result = call()
    end.record()
    torch.cuda.synchronize()
    del result
    return start.elapsed_time(end) / 1e3


def jax_seconds(call: Call, calls: int = 10) -> float:
    """By the clock over several calls, one after the other, for one alone is shorter than its launch."""
    import jax

    jax.block_until_ready(call())
    started = time.perf_counter()
    result = None
    for _ in range(calls):
        del result
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - started) / calls


def torch_inputs(case: Case) -> dict[str, Any]:
    """Of `point_attention`, at random on the device; all but the mask want gradients. All systems share them."""
    return dict(_torch_inputs(case))


@lru_cache(maxsize=1)
def _torch_inputs(case: Case) -> dict[str, Any]:
    import torch

    c = IPAConfig.alphafold2()
    n, h = case.residues, c.num_head
    generator = torch.Generator(case.device).manual_seed(n)

    def draw(*shape: int, dtype: Any = torch.float32) -> Any:
        return torch.randn(shape, generator=generator, device=case.device, dtype=dtype).requires_grad_()

    has_pair, width = case.pair != "none", c.pair_channel or 0
    return {
        "q": draw(n, h, c.num_scalar_qk),
        "k": draw(n, h, c.num_scalar_qk),
        "v": draw(n, h, c.num_scalar_v),
        "q_points": draw(n, h, c.num_point_qk, 3),
        "k_points": draw(n, h, c.num_point_qk, 3),
        "v_points": draw(n, h, c.num_point_v, 3),
        "pair": draw(n, n, width, dtype=getattr(torch, case.pair)) if has_pair else None,
        "pair_bias_weight": draw(width, h) if has_pair else None,
        "point_weights": torch.ones(h, device=case.device).requires_grad_(),
        "mask": (torch.rand(n, generator=generator, device=case.device) > 0.1).float(),
    }


def torch_attend(arrays: dict[str, Any], implementation: Implementation) -> list[Any]:
    """Outputs of the core."""
    import ipa_torch

    return [x for x in ipa_torch.point_attention(**arrays, implementation=implementation) if x is not None]


def torch_directions(forward: Callable[[], list[Any]], leaves: list[Any]) -> dict[str, Call]:
    """A function that returns outputs, called without gradients and with those of their squared sum."""
    import torch

    def backward() -> Any:
        return torch.autograd.grad(sum((x.float() ** 2).sum() for x in forward()), leaves, allow_unused=True)

    return {FORWARD: torch.no_grad()(forward), BACKWARD: backward}


def torch_core(implementation: Implementation, case: Case) -> dict[str, Call]:
    """Our core."""
    arrays = torch_inputs(case)
    leaves = [x for name, x in arrays.items() if x is not None and name != "mask"]
    return torch_directions(partial(torch_attend, arrays, implementation), leaves)


def compiled_textbook(case: Case) -> dict[str, Call]:
    """The reference under `torch.compile`."""
    import torch

    torch._dynamo.reset()
    arrays = torch_inputs(case)
    leaves = [x for name, x in arrays.items() if x is not None and name != "mask"]
    return torch_directions(torch.compile(partial(torch_attend, arrays, "reference"), dynamic=False), leaves)


def torch_sdpa(case: Case) -> dict[str, Call]:
    """`scaled_dot_product_attention` for the form without a pair: distances expanded into further channels.

    What is lost to cancellation there is not judged; queries and keys have 30 channels, values 40.
    """
    import torch
    import torch.nn.functional as F

    x = torch_inputs(case)
    leaves = [y for name, y in x.items() if y is not None and name != "mask"]

    def forward() -> list[Any]:
        q, k, v = (y.transpose(0, 1)[None] for y in (x["q"], x["k"], x["v"]))
        weight = (x["point_weights"] / math.sqrt(4.5 * x["q_points"].shape[-2]))[:, None, None]
        ends = [y.flatten(-2).transpose(0, 1)[None] for y in (x["q_points"], x["k_points"])]
        ones = torch.ones_like(q[..., :1])
        lengths = [-0.5 * weight * (y * y).sum(-1, keepdim=True) for y in ends]
        left = torch.cat([q / math.sqrt(q.shape[-1]), weight * ends[0], lengths[0], ones], -1)
        right = torch.cat([k, ends[1], ones, lengths[1]], -1)
        values = torch.cat([v, x["v_points"].flatten(-2).transpose(0, 1)[None]], -1)
        width = max(left.shape[-1], values.shape[-1])
        left, right, values = (F.pad(y, (0, width - y.shape[-1])) for y in (left, right, values))
        mask = x["mask"].bool()[None, None, None]
        return [F.scaled_dot_product_attention(left, right, values, attn_mask=mask, scale=math.sqrt(0.5))]

    return torch_directions(forward, leaves)


def in_graphs(prepare: Callable[[Case], dict[str, Call]], case: Case) -> dict[str, Call]:
    """The same calls, captured and replayed."""
    return {direction: Captured(call) for direction, call in prepare(case).items()}


class Captured:
    """A call that is captured at its first use, and replayed since."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.graph: Any = None

    def __call__(self) -> Any:
        """Replays."""
        import torch

        if self.graph is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self.call()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                self.result = self.call()
            self.graph = graph
        self.graph.replay()
        return self.result


def torch_module(implementation: Implementation, case: Case) -> dict[str, Call]:
    """Our whole class."""
    import ipa_torch

    single, pair, rotation, translation, mask = module_inputs(case)
    config = IPAConfig.alphafold2()
    config = config if pair is not None else replace(config, pair_channel=None)
    module = ipa_torch.InvariantPointAttention(config, implementation=implementation).to(case.device)
    rigids = ipa_torch.Rigid(rotation, translation)
    leaves = [x for x in (single, pair, *module.parameters()) if x is not None]
    return torch_directions(lambda: [module(single, pair, rigids, mask)], leaves)


def esmfold(case: Case) -> dict[str, Call]:
    """`transformers`' EsmFold attention, which is OpenFold's."""
    from transformers.models.esm.openfold_utils import Rigid, Rotation

    single, pair, rotation, translation, mask = module_inputs(case)
    module = peers.esmfold_module(make_case("", IPAConfig.alphafold2(), (2,)).astype("float32")).to(case.device)
    rigids = Rigid(Rotation(rot_mats=rotation), translation)
    leaves = [single, pair, *module.parameters()]
    return torch_directions(lambda: [module(single, pair, rigids, mask)], leaves)


def module_inputs(case: Case) -> tuple[Any, ...]:
    """Single, pair, rotations, translations and mask at random on the device; the pair is the core's."""
    import torch

    from ipa_bridge.proteins.frames import random_frames

    c = IPAConfig.alphafold2()
    n = case.residues
    generator = torch.Generator(case.device).manual_seed(n)
    options: dict[str, Any] = {"generator": generator, "device": case.device}
    rotation, translation = random_frames(np.random.default_rng(n), (n,), spread=2.0)
    frames = (torch.from_numpy(x.astype(np.float32)).to(case.device) for x in (rotation, translation))
    single = torch.randn((n, c.num_channel), **options).requires_grad_()
    pair = None
    if case.pair != "none":
        pair = torch_inputs(case)["pair"]
    return single, pair, *frames, (torch.rand(n, **options) > 0.1).float()


def jax_calls(forward: Callable, leaves: Any, others: Any) -> dict[str, Call]:
    """A function of what wants gradients and what does not, under jit, compiled at first use."""
    import jax

    def loss(leaves: Any, others: Any) -> Any:
        return sum((x.astype("float32") ** 2).sum() for x in jax.tree.leaves(forward(leaves, others)))

    return {
        FORWARD: CompiledByJax(forward, leaves, others),
        BACKWARD: CompiledByJax(jax.grad(loss), leaves, others),
    }


class CompiledByJax:
    """A call of a compiled function, which knows what memory XLA planned."""

    def __init__(self, function: Callable, *inputs: Any) -> None:
        self.function, self.inputs = function, inputs
        self.compiled: Any = None
        self.planned_bytes: int | None = None

    def __call__(self) -> Any:
        """Compiles, if it has not, and calls."""
        import jax

        if self.compiled is None:
            self.compiled = jax.jit(self.function).lower(*self.inputs).compile()
            plan = self.compiled.memory_analysis()
            self.planned_bytes = int(plan.temp_size_in_bytes + plan.output_size_in_bytes) if plan else None
        return self.compiled(*self.inputs)


def jax_core(implementation: Implementation, case: Case) -> dict[str, Call]:
    """Our core in JAX."""
    attend = jax_point_attention()
    arrays = {name: x if x is None else from_torch(x) for name, x in torch_inputs(case).items()}
    others = {"mask": arrays.pop("mask")}

    def forward(leaves: Any, others: Any) -> Any:
        return attend(**leaves, **others, implementation=implementation)

    return jax_calls(forward, arrays, others)


def jax_module(which: str, case: Case) -> dict[str, Call]:
    """Our whole class in JAX, or AlphaFold's."""
    import haiku as hk

    import ipa_jax
    from ipa_bridge.weights import Weights

    config = IPAConfig.alphafold2()
    single, pair, rotation, translation, mask = map(from_torch, module_inputs(case))
    params = Weights.random(config).to_haiku()
    if which == "alphafold":
        transformed: Any = hk.without_apply_rng(hk.transform(peers.alphafold_forward(config)))

        def forward(leaves: Any, others: Any) -> Any:
            return transformed.apply(*leaves, *others)

    else:
        apply = ipa_jax.transform_ipa(config, implementation=cast(Implementation, which)).apply

        def forward(leaves: Any, others: Any) -> Any:
            mask, *frames = others
            return apply(*leaves, ipa_jax.Rigid(*frames), mask)

    return jax_calls(forward, (params, single, pair), (mask, rotation, translation))


def from_torch(x: Any) -> Any:
    """A JAX array of the same numbers on the same device."""
    import jax

    return jax.dlpack.from_dlpack(x.detach().contiguous())


def table(rows: list[dict], machine: dict[str, Any]) -> str:
    """For people."""
    lines = [
        f"{machine['name']}, PyTorch {machine['torch']}; a copy moves {machine['bytes'] / 1e12:.2f} TB/s",
        *(f"not measured: {reason}" for reason in machine["absent"]),
        "",
        f"{'system':36} {'kind':7} {'residues':>8}  {'pair':8} {'direction':18} {'time':>11} {'share':>6}     memory",
        "-" * 112,
    ]
    for x in rows:
        took = f"{x['seconds'] * 1e6:8.0f} µs" if x["seconds"] else "no memory"
        share = f"{x['share']:.2f}" if x["share"] else ""
        memory = f"{x['bytes'] / 2**20:.0f} MiB" if x["bytes"] else ""
        case = f"{x['system']:36} {x['kind']:7} {x['residues']:8}  {x['pair']:8} {x['direction']:18}"
        lines.append(f"{case} {took:>11} {share:>6} {memory:>10}")
    lines += ["", *against_targets(rows)]
    return "\n".join(lines)


def against_targets(rows: list[dict]) -> Iterator[str]:
    """What the fused core was to take, beside what it took."""
    for (pair, residues), (forward, backward) in TARGETS.items():
        for x in rows:
            if (
                x["system"].startswith("torch, fused")
                and (x["pair"], x["residues"]) == (pair, residues)
                and x["seconds"]
            ):
                wanted = forward if x["direction"] == FORWARD else forward + backward
                verdict = "met" if x["seconds"] * 1e6 <= wanted else "missed"
                yield (
                    f"target {verdict}: {x['system']}, {residues} residues, {pair} pair, {x['direction']}: "
                    f"{x['seconds'] * 1e6:.0f} of {wanted} µs"
                )


if __name__ == "__main__":
    sys.exit(main())
