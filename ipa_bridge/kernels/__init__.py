"""GPU kernels of the attention: what they can do, and in which chunks. Triton is imported with their source only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs kernels on the CPU, in Python, as it does for tests."""

PAIR_CHANNELS = (32, 64, 128, 256)
PAIR_DTYPES = ("float32", "bfloat16")
MOST_HEADS = 16
"""One tile of a tensor core."""

MOST_CHANNELS, MOST_COORDINATES, MOST_VALUES = 64, 48, 128
"""A head's: of queries, of their points, and of values with their points. Tiles of them lie in registers."""

CHUNK_BYTES = 16 << 20
"""Of logits between two kernels, so that they stay in the GPU's cache (40 MB on an A100, 50 on an H100)."""

MOST_PROGRAMS = 65535
"""On the second and third axes of a grid."""

LONGEST_TILE = 64
"""Of keys."""

LEAST_QUERIES = 264
"""In a chunk: two programs on each of an H100's multiprocessors."""


class Sizes(NamedTuple):
    """Of one attention."""

    examples: int
    number: int
    heads: int
    channels: int
    coordinates: int
    """Of a head's query points: 3P."""
    values: int
    """Channels of values and coordinates of their points together."""
    pair_channel: int
    """0 for no pair."""


class Chunk(NamedTuple):
    """Whole examples, or some query rows of one."""

    example: int
    examples: int
    row: int
    rows: int


class Tiles(NamedTuple):
    """What one program of a kernel works on at a time, and how it is run."""

    rows: int
    """Query rows; 1 where a program has one."""
    keys: int
    warps: int
    stages: int
    """Loads that are under way."""


TILES = {
    "logits": Tiles(64, 64, 8, 1),
    "attend_to_pair": Tiles(1, 32, 4, 3),
    "attend": Tiles(64, 32, 4, 2),
    "pair_gradients": Tiles(1, 16, 8, 2),
    "query_gradients": Tiles(32, 32, 4, 2),
    "key_gradients": Tiles(16, 32, 8, 1),
}
"""Chosen by what compiles without spilling for sm_80 and sm_90: `python -m ipa_bridge.kernels.resources`."""

TILES_ON_PAIR = {
    ("attend_to_pair", "float32", 256): Tiles(1, 16, 8, 2),
    ("attend_to_pair", "bfloat16", 32): Tiles(1, 64, 4, 3),
    ("attend_to_pair", "bfloat16", 64): Tiles(1, 64, 4, 3),
    ("attend_to_pair", "bfloat16", 128): Tiles(1, 64, 4, 3),
    ("pair_gradients", "bfloat16", 32): Tiles(1, 32, 4, 2),
    ("pair_gradients", "bfloat16", 64): Tiles(1, 32, 4, 2),
    ("pair_gradients", "bfloat16", 128): Tiles(1, 32, 4, 2),
    ("pair_gradients", "bfloat16", 256): Tiles(1, 32, 8, 2),
}
"""By the pair's dtype and width, where others are better."""

TILES_OF_WIDE_HEADS = {
    "logits": Tiles(32, 64, 8, 1),
    "attend": Tiles(32, 32, 4, 2),
    "query_gradients": Tiles(16, 32, 4, 2),
    "key_gradients": Tiles(16, 32, 8, 1),
}
"""Where heads are wider than AlphaFold's."""


def tiles(kernel: str, sizes: Sizes, pair_dtype: str | None) -> Tiles:
    """Of a kernel."""
    wide = sizes.channels > 16 or sizes.coordinates > 12 or sizes.values > 48
    if wide and kernel in TILES_OF_WIDE_HEADS:
        return TILES_OF_WIDE_HEADS[kernel]
    return TILES_ON_PAIR.get((kernel, pair_dtype or "", sizes.pair_channel), TILES[kernel])


def unsupported(sizes: Sizes, dtype: str, pair_dtype: str | None) -> str | None:
    """Why the kernels cannot do this; None where they can."""
    if dtype != "float32":
        return f"its arithmetic is float32's; here it would be {dtype}'s"
    if pair_dtype is not None and pair_dtype not in PAIR_DTYPES:
        return f"a pair in {' or '.join(PAIR_DTYPES)} was expected; got {pair_dtype}"
    if pair_dtype is not None and sizes.pair_channel not in PAIR_CHANNELS:
        return f"a pair of {', '.join(map(str, PAIR_CHANNELS))} channels was expected; got {sizes.pair_channel}"
    if sizes.heads > MOST_HEADS:
        return f"at most {MOST_HEADS} heads were expected; got {sizes.heads}"
    for what, found, most in (
        ("channels of queries", sizes.channels, MOST_CHANNELS),
        ("coordinates of query points", sizes.coordinates, MOST_COORDINATES),
        ("channels and coordinates of values", sizes.values, MOST_VALUES),
    ):
        if not 0 < found <= most:
            return f"1 to {most} {what} a head were expected; got {found}"
    return None


def chunks(sizes: Sizes) -> Iterator[Chunk]:
    """All queries, so many at a time that their logits stay in cache."""
    if not (sizes.examples and sizes.number):
        return
    # Each query has a row of logits, and backwards a gradient to the bias.
    queries = max(LEAST_QUERIES, CHUNK_BYTES // (4 * sizes.heads * max(stride(sizes), sizes.pair_channel)))
    at_once = max(1, min(queries // sizes.number, MOST_PROGRAMS // sizes.heads))
    rows = -(-sizes.number // -(-sizes.number // queries))  # as many in the last chunk, or nearly
    for example in range(0, sizes.examples, at_once):
        for row in range(0, sizes.number, rows):
            yield Chunk(example, min(at_once, sizes.examples - example), row, min(rows, sizes.number - row))


def stride(sizes: Sizes) -> int:
    """How far the rows of a chunk's logits lie apart: whole tiles, so that they are aligned and read without masks."""
    return -(-sizes.number // LONGEST_TILE) * LONGEST_TILE
