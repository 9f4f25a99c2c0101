"""Seconds that importing a package adds to importing its framework: `python -m benchmarks.import_time`."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import {framework}
import time
started = time.perf_counter()
import {package}
print(time.perf_counter() - started)
"""


def main() -> int:
    """Prints the minimum and the range over five fresh interpreters."""
    for package, framework in (("ipa_jax", "jax, haiku"), ("ipa_torch", "torch")):
        command = [sys.executable, "-c", SCRIPT.format(package=package, framework=framework)]
        runs = [float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(5)]
        print(f"{package} after {framework}: {min(runs):.2f} s ({min(runs):.2f}–{max(runs):.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
