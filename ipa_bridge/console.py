"""Shared parts of the commands: a quiet end when they are stopped, a progress line, and tables."""

from __future__ import annotations

import functools
import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol

INTERRUPTED, BROKEN_PIPE = 130, 141
"""Exit statuses that shells use for an interruption and for a closed output pipe."""


class Main(Protocol):
    """A command's main function; without `argv` it takes the arguments of the command line."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...  # noqa: D102


def as_command(main: Callable[[Sequence[str] | None], int]) -> Main:
    """Wraps a command's main function so that it prints on any terminal and ends quietly when it is stopped."""

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a terminal may be unable to print √
        status = BROKEN_PIPE
        try:
            status = main(argv)
            sys.stdout.flush()
        except BrokenPipeError:  # as with `| head`; if main has returned, its status stands
            sys.stdout = open(os.devnull, "w")
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return INTERRUPTED
        return status

    return run


class Progress:
    """One line on standard error that shows what is running.

    Args:
        shown: False for no progress at all.
        delay: seconds that pass before anything is drawn.
    """

    def __init__(self, *, shown: bool = True, delay: float = 0.0) -> None:
        self.shown, self.delay = shown, delay
        self.started, self.drawn = time.perf_counter(), False

    def __call__(self, step: str) -> None:
        """Shows the running step and the seconds since the start; without a terminal, each step gets its own line."""
        seconds = time.perf_counter() - self.started
        if not self.shown or seconds < self.delay:
            return
        if sys.stderr.isatty():
            self._draw(f"{seconds:5.0f} s  {step}")
        else:
            print(f"{seconds:5.0f} s  {step}", file=sys.stderr, flush=True)

    def bar(self, what: str, done: int, of: int, width: int = 30) -> None:
        """Draws a progress bar and removes it when all is done; only on a terminal."""
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
