"""Peak memory of one call above its inputs: on a CPU in a process of its own, on a GPU by PyTorch's allocator.

`python -m benchmarks.memory ipa "ipa_torch" 1024 "forward"` measures one call and prints a line of JSON.
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
"""Words by which error messages of PyTorch, XLA, CUDA and the CPU's allocators report too little memory."""


def peak(module: str, system: str, residues: int, direction: str) -> dict | None:
    """The result of `measure` in a fresh process; None where there is not enough memory."""
    command = [sys.executable, "-m", "benchmarks.memory", module, system, str(residues), direction]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    if run.returncode:
        if run.returncode < 0 or is_out_of_memory(run.stderr):
            return None
        raise RuntimeError(f"{' '.join(command[2:])} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def measure(module: str, system: str, residues: int, direction: str) -> dict:
    """Peak bytes above those resident before the call, and the seconds of compiling and of the call.

    The inputs are resident before the call. A first call on 16 residues makes the libraries load everything that they
    load at first use.
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
    """Bytes of this process from a line of Linux's /proc/self/status: VmRSS is now, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> None:
    """Resets the peak, so that `resident("VmHWM")` counts from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def available() -> int:
    """Bytes of memory available on the machine."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


def peak_on_gpu(call: Call) -> int:
    """Peak bytes above those held before a PyTorch call, by its allocator on the GPU."""
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
    release()  # here, where nothing refers to the failed call's memory any more
    return None


def is_out_of_memory(message: str) -> bool:
    """True where an error message reports too little memory."""
    return any(words in message.lower() for words in OUT_OF_MEMORY)


def release() -> None:
    """Frees memory that is no longer referenced."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    # Beyond this limit an allocation fails, and the machine does not.
    resource.setrlimit(resource.RLIMIT_DATA, (available(), resource.RLIM_INFINITY))
    print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])))
