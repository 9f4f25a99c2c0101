"""Commands behave as people at a terminal expect: an interruption and a closed pipe end them without a traceback."""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

INTERRUPTED = 130
"""The exit status by which shells tell an interruption."""


class Main(Protocol):
    """A command's main, which takes the arguments of the command line unless it is given some."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...  # noqa: D102


def as_command(main: Callable[[Sequence[str] | None], int]) -> Main:
    """What every command's main does besides: print on any terminal, and end quietly when it is stopped."""

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a terminal may have no √
        try:
            status = main(argv)
            sys.stdout.flush()
        except BrokenPipeError:  # as of `| head`
            sys.stdout = open(os.devnull, "w")
            return 0
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return INTERRUPTED
        return status

    return run
