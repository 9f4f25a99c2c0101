"""Sizes of the blocks, chunks and tiles that the attention is computed in, and limits of the GPU kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

PAIR_CHANNELS = (32, 64, 128, 256)
PAIR_DTYPES = ("float32", "bfloat16")
MAX_HEADS = 16
"""Largest number of heads in the kernels: one tile of a tensor core."""

MAX_CHANNELS, MAX_COORDINATES, MAX_VALUES = 64, 48, 128
"""Largest widths of a head in the kernels, whose tiles of these are held in registers.

They are the channels of queries, the coordinates of query points, and the channels of values with the coordinates of
value points.
"""

CHUNK_BYTES = 16 << 20
"""Bytes of logits that one kernel leaves to the next: they fit a GPU's cache (40 MB on an A100, 50 on an H100)."""

MAX_PROGRAMS = 65535
"""Largest length of the second and third axes of a CUDA grid."""

MAX_TILE_KEYS = 64
"""Largest number of keys in a tile."""

MIN_QUERIES = 264
"""Smallest number of queries in a chunk: two programs on each of an H100's 132 multiprocessors."""

MAX_ROWS = 64
"""Largest number of query rows in a block of the streamed attention; on a GPU, blocks of long chains have more."""


class Sizes(NamedTuple):
    """Sizes of one attention."""

    examples: int
    number: int
    heads: int
    channels: int
    coordinates: int
    """Coordinates of a head's query points: 3P."""
    values: int
    """Channels of a head's values plus coordinates of its value points."""
    pair_channel: int
    """Width of the pair; 0 for no pair."""


class Chunk(NamedTuple):
    """The part of a batch that one launch computes: whole examples, or some query rows of one example."""

    example: int
    examples: int
    row: int
    rows: int


class Tiles(NamedTuple):
    """The tile that one program of a kernel works on at a time, and the settings of its launch."""

    rows: int
    """Query rows; 1 if a program computes a single row."""
    keys: int
    warps: int
    stages: int
    """Number of loads in flight (software pipelining)."""


TILES = {
    "logits": Tiles(64, 64, 8, 1),
    "attend_to_pair": Tiles(1, 32, 4, 3),
    "attend": Tiles(64, 32, 4, 2),
    "pair_gradients": Tiles(1, 16, 8, 2),
    "query_gradients": Tiles(32, 32, 4, 2),
    "key_gradients": Tiles(16, 32, 8, 1),
}
"""Tiles by kernel, which compile without spilling for sm_80 and sm_90: `python -m benchmarks.kernel_resources`."""

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
"""Exceptions to `TILES`, by the pair's dtype and width."""

TILES_OF_WIDE_HEADS = {
    "logits": Tiles(32, 64, 8, 1),
    "attend": Tiles(32, 32, 4, 2),
    "query_gradients": Tiles(16, 32, 4, 2),
    "key_gradients": Tiles(16, 32, 8, 1),
}
"""Exceptions to `TILES` for heads wider than AlphaFold's."""


def tiles(kernel: str, sizes: Sizes, pair_dtype: str | None) -> Tiles:
    """The tiles of a kernel."""
    wide = sizes.channels > 16 or sizes.coordinates > 12 or sizes.values > 48
    if wide and kernel in TILES_OF_WIDE_HEADS:
        return TILES_OF_WIDE_HEADS[kernel]
    return TILES_ON_PAIR.get((kernel, pair_dtype or "", sizes.pair_channel), TILES[kernel])


def grid(kernel: str, sizes: Sizes, chunk: Chunk, tile: Tiles) -> tuple[int, ...]:
    """Number of programs along each axis of the grid that a kernel launches for a chunk."""
    heads = chunk.examples * sizes.heads
    by_row, by_key = -(-chunk.rows // tile.rows), -(-sizes.number // tile.keys)
    if kernel == "logits":
        return by_key, by_row, heads
    if kernel in ("attend_to_pair", "pair_gradients"):
        return (chunk.examples * chunk.rows,)
    return by_key if kernel == "key_gradients" else by_row, heads


def unsupported(sizes: Sizes, dtype: str, pair_dtype: str | None) -> str | None:
    """The reason why the kernels cannot compute an attention; None if they can."""
    if dtype != "float32":
        return f"its arithmetic is float32; got {dtype}"
    if pair_dtype is not None and pair_dtype not in PAIR_DTYPES:
        return f"a pair in {' or '.join(PAIR_DTYPES)} was expected; got {pair_dtype}"
    if pair_dtype is not None and sizes.pair_channel not in PAIR_CHANNELS:
        return f"a pair of {', '.join(map(str, PAIR_CHANNELS))} channels was expected; got {sizes.pair_channel}"
    if sizes.heads > MAX_HEADS:
        return f"at most {MAX_HEADS} heads were expected; got {sizes.heads}"
    for what, found, most in (
        ("channels of queries", sizes.channels, MAX_CHANNELS),
        ("coordinates of query points", sizes.coordinates, MAX_COORDINATES),
        ("channels and coordinates of values", sizes.values, MAX_VALUES),
    ):
        if not 0 < found <= most:
            return f"1 to {most} {what} a head were expected; got {found}"
    return None


def chunks(sizes: Sizes) -> Iterator[Chunk]:
    """Splits all queries into chunks whose logits stay in the GPU's cache."""
    if not (sizes.examples and sizes.number):
        return
    # Each query has a row of logits and, in the backward pass, a gradient of the pair bias.
    queries = max(MIN_QUERIES, CHUNK_BYTES // (4 * sizes.heads * max(stride(sizes), sizes.pair_channel)))
    at_once = max(1, min(queries // sizes.number, MAX_PROGRAMS // sizes.heads))
    rows = -(-sizes.number // -(-sizes.number // queries))  # chunks are nearly equal, including the last
    for example in range(0, sizes.examples, at_once):
        for row in range(0, sizes.number, rows):
            yield Chunk(example, min(at_once, sizes.examples - example), row, min(rows, sizes.number - row))


def stride(sizes: Sizes) -> int:
    """Distance between the rows of a chunk's logits: whole tiles, so that rows are aligned and read without masks."""
    return -(-sizes.number // MAX_TILE_KEYS) * MAX_TILE_KEYS


def default_block_size(number: int, heads: int, pair_channel: int, *, block_bytes: int, on_gpu: bool = False) -> int:
    """Query rows in a block: few enough for the cache to hold their part of the pair or, on a GPU, their logits.

    On a GPU, every block costs the same number of launches. Blocks there are as large as the cache allows, up to an
    eighth of the rows or `MAX_ROWS` if that is more.
    """
    if on_gpu:
        return max(1, min(number, max(MAX_ROWS, number // 8), CHUNK_BYTES // max(1, 4 * heads * number)))
    return max(1, min(number, MAX_ROWS, block_bytes // max(1, 4 * number * max(pair_channel, 1))))
