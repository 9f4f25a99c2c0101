"""What commands share: a quiet end when they are stopped, a line of progress, and tables."""

from __future__ import annotations

import functools
import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol

INTERRUPTED, BROKEN_PIPE = 130, 141
"""The exit statuses by which shells tell an interruption, and that nobody reads on."""


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
        status = BROKEN_PIPE
        try:
            status = main(argv)
            sys.stdout.flush()
        except BrokenPipeError:  # as of `| head`; what was found out stands
            sys.stdout = open(os.devnull, "w")
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return INTERRUPTED
        return status

    return run


class Progress:
    """One line on standard error that says what is running.

    Args:
        shown: False for no progress at all.
        delay: seconds that pass before anything is drawn.
    """

    def __init__(self, *, shown: bool = True, delay: float = 0.0) -> None:
        self.shown, self.delay = shown, delay
        self.started, self.drawn = time.perf_counter(), False

    def __call__(self, step: str) -> None:
        """Says which step is running since how long; on a line of its own where there is no terminal."""
        seconds = time.perf_counter() - self.started
        if not self.shown or seconds < self.delay:
            return
        if sys.stderr.isatty():
            self._draw(f"{seconds:5.0f} s  {step}")
        else:
            print(f"{seconds:5.0f} s  {step}", file=sys.stderr, flush=True)

    def bar(self, what: str, done: int, of: int, width: int = 30) -> None:
        """Draws how much is done, until all is; only on a terminal."""
        if not self.shown or time.perf_counter() - self.started < self.delay or not sys.stderr.isatty():
            return
        full = width * done // max(of, 1)
        self._draw(f"{what} {'█' * full}{'░' * (width - full)} {done}/{of}")
        if done >= of:
            self.clear()

    def clear(self) -> None:
        """Removes the line from the terminal."""
        if self.drawn:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _draw(self, text: str) -> None:
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        self.drawn = True


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table's rows as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
