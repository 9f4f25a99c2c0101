"""Peak memory of one call above its inputs, each measured in a process of its own.

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

from benchmarks.resident import available, forget_peak, status
from benchmarks.systems import Inputs, named


def peak(module: str, system: str, residues: int, direction: str) -> dict | None:
    """What `measure` tells, from a fresh process; None where there is not enough memory."""
    command = [sys.executable, "-m", "benchmarks.memory", module, system, str(residues), direction]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    if run.returncode:
        out_of_memory = ("MemoryError", "DefaultCPUAllocator", "RESOURCE_EXHAUSTED", "bad_alloc", "Out of memory")
        if run.returncode < 0 or any(word in run.stderr for word in out_of_memory):
            return None
        raise RuntimeError(f"{' '.join(command[2:])} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def measure(module: str, system: str, residues: int, direction: str) -> dict:
    """Bytes above what is resident before the call, inputs included; and the seconds of compiling and of the call.

    A first call on 16 residues loads what libraries load when first used.
    """
    prepare = named(module, system).prepare
    prepare(Inputs.draw(16))[direction]()()
    inputs = Inputs.draw(residues)
    size = inputs.pair.nbytes
    ready = prepare(inputs)[direction]
    if named(module, system).framework == "jax":
        del inputs  # JAX has its own copy, or keeps this one alive
    started = time.perf_counter()
    call = ready()
    compiling = time.perf_counter() - started
    gc.collect()
    forget_peak()
    before = status("VmRSS")
    started = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - started
    after = status("VmHWM")
    del result
    return {"bytes": after - before, "pair_bytes": size, "compiling": compiling, "seconds": seconds}


if __name__ == "__main__":
    # Past this an allocation fails, instead of the machine.
    resource.setrlimit(resource.RLIMIT_DATA, (available(), resource.RLIM_INFINITY))
    print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])))
