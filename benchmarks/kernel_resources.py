"""Registers, spills and shared memory that the GPU kernels use, found by compiling them. This needs no GPU.

python -m benchmarks.kernel_resources [--target sm_80 sm_90] [--pair-channel 32 64 128 256] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ipa_bridge.tiling import (
    MAX_CHANNELS,
    MAX_COORDINATES,
    MAX_VALUES,
    PAIR_CHANNELS,
    PAIR_DTYPES,
    Sizes,
    tiles,
)
from ipa_torch.attention.kernels import KERNELS, compiler_options, constants

ALPHAFOLD = Sizes(1, 1024, 12, 16, 12, 40, 128)
WIDEST = ALPHAFOLD._replace(channels=MAX_CHANNELS, coordinates=MAX_COORDINATES, values=MAX_VALUES)

SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10}
"""Bytes that one program may use (CUDA C++ Programming Guide, technical specifications per compute capability)."""


class Resources(NamedTuple):
    """Registers and memory that one program of a compiled kernel takes."""

    kernel: str
    target: str
    pair_dtype: str
    pair_channel: int
    channels: int
    """Channels of a head."""
    warps: int
    registers: int
    """Registers per thread, of at most 255."""
    spilled: int
    """Bytes per thread that did not fit in registers and lie in memory."""
    shared: int
    """Bytes of shared memory."""


def measure(kernel: str, target: str, pair_dtype: str | None, sizes: Sizes, *, backward: bool = True) -> Resources:
    """Compiles a kernel for a target and reads the resources that the compiled code uses."""
    function, tile = KERNELS[kernel], tiles(kernel, sizes, pair_dtype)
    has_pair = pair_dtype is not None
    options = {"has_mask": True, "backward": backward, "d_pair": has_pair, "interpret": False}
    compiled_for = constants(kernel, sizes, pair_dtype=pair_dtype, **options)
    of_pair = {"float32": "*fp32", "bfloat16": "*bf16", None: "*fp32"}[pair_dtype]
    types = {
        name: "i32"
        if name in ("example", "row", "rows", "number", "stride")
        else of_pair
        if "pair" in name.split("_")
        else "*fp32"
        for name in function.arg_names
    }
    types |= dict.fromkeys({"o_pair", "d_o_pair"} & set(types), "*fp32") | dict.fromkeys(compiled_for, "constexpr")
    aligned = [name for name, kind in types.items() if kind.startswith("*")] + ["stride"]
    source = ASTSource(
        fn=function,
        signature=types,
        constexprs=compiled_for,
        attrs={(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", int(target.removeprefix("sm_")), 32),
        options=compiler_options(tile),
    )
    used = _usage(compiled.asm["cubin"])
    return Resources(
        kernel,
        target,
        pair_dtype or "none",
        sizes.pair_channel if has_pair else 0,
        sizes.channels,
        tile.warps,
        used["REG"],
        used["STACK"] + used["LOCAL"],
        compiled.metadata.shared,
    )


def _usage(cubin: bytes) -> dict[str, int]:
    """Resources by name, as printed by `cuobjdump`, which Triton includes."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}


def every(targets: list[str], pair_channels: Sequence[int] = PAIR_CHANNELS) -> list[Resources]:
    """All kernels at AlphaFold's sizes: those of the pair for every kind of pair, the others for wide heads too."""
    found = []
    for target in targets:
        for kernel in KERNELS:
            if "pair" not in kernel:
                found += [measure(kernel, target, None, sizes) for sizes in (ALPHAFOLD, WIDEST)]
                continue
            pairs = [(dtype, width) for dtype in PAIR_DTYPES for width in pair_channels]
            for dtype, width in [*pairs, (None, 0)]:
                found.append(measure(kernel, target, dtype, ALPHAFOLD._replace(pair_channel=width)))
    return found


def table(found: list[Resources]) -> str:
    """The resources as a text table."""
    lines = ["kernel           target  pair      c_z  head  warps  registers  spilled    shared", "-" * 81]
    lines += [
        f"{x.kernel:16} {x.target:7} {x.pair_dtype:9} {x.pair_channel or '':3}  {x.channels:4}  {x.warps:5}  "
        f"{x.registers:9}  {x.spilled:5} B  {x.shared / 1024:4.0f} KiB"
        for x in found
    ]
    return "\n".join(lines)


def main() -> None:
    """Compiles the kernels and prints what they use."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", default=list(SHARED_MEMORY), help="compute capabilities to compile for")
    parser.add_argument("--pair-channel", nargs="+", type=int, default=PAIR_CHANNELS, help="channels of the pair")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 is set, and the interpreter compiles nothing: unset it")
    found: list[Any] = every(args.target, args.pair_channel)
    print(json.dumps([x._asdict() for x in found], indent=1) if args.json else table(found))


if __name__ == "__main__":
    main()
