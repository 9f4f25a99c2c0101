"""Peak memory of one call above its inputs: on a CPU each in a process of its own, on a GPU as its allocator saw it.

`python -m benchmarks.memory ipa "ipa_torch" 1024 "forward"` measures one, and prints a line of JSON.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.calls import Call
from benchmarks.systems import Inputs, find_system

OUT_OF_MEMORY = (
    "memoryerror",
    "defaultcpuallocator",
    "resource_exhausted",
    "bad_alloc",
    "alloc_failed",
    "out of memory",
)
"""By these words PyTorch, XLA, CUDA and the CPU's allocators complain."""


def peak(module: str, system: str, residues: int, direction: str) -> dict | None:
    """What `measure` tells, from a fresh process; None where there is not enough memory."""
    command = [sys.executable, "-m", "benchmarks.memory", module, system, str(residues), direction]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    if run.returncode:
        if run.returncode < 0 or is_out_of_memory(run.stderr):
            return None
        raise RuntimeError(f"{' '.join(command[2:])} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def measure(module: str, system: str, residues: int, direction: str) -> dict:
    """Bytes above what is resident before the call, inputs included; and the seconds of compiling and of the call.

    A first call on 16 residues loads what libraries load when first used.
    """
    prepare = find_system(module, system).prepare
    prepare(Inputs.draw(16))[direction]()()
    inputs = Inputs.draw(residues)
    size = inputs.pair.nbytes
    ready = prepare(inputs)[direction]
    if find_system(module, system).framework == "jax":
        del inputs  # JAX has its own copy, or keeps this one alive
    started = time.perf_counter()
    call = ready()
    compiling = time.perf_counter() - started
    gc.collect()
    forget_peak()
    before = resident("VmRSS")
    started = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - started
    after = resident("VmHWM")
    del result
    return {"bytes": after - before, "pair_bytes": size, "compiling": compiling, "seconds": seconds}


def resident(field: str) -> int:
    """Bytes of this process, by a line of its status in Linux: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> None:
    """Makes `resident("VmHWM")` the peak from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def available() -> int:
    """Bytes that the machine can give."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


def peak_on_gpu(call: Call) -> int:
    """Bytes above what is held before PyTorch's call, as its allocator on the GPU saw."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    found = torch.cuda.max_memory_allocated() - before
    del result
    return found


def attempt(call: Callable[[], Any]) -> Any:
    """The call's result; None where there is not enough memory."""
    try:
        return call()
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not is_out_of_memory(str(error)):
            raise
    release()  # now that nobody holds what the failed call had
    return None


def is_out_of_memory(message: str) -> bool:
    """True where an error's text tells of too little memory."""
    return any(words in message.lower() for words in OUT_OF_MEMORY)


def release() -> None:
    """Lets go of memory that nobody holds."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    # Past this an allocation fails, instead of the machine.
    resource.setrlimit(resource.RLIMIT_DATA, (available(), resource.RLIM_INFINITY))
    print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])))
