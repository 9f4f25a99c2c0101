"""How the kernels are launched: what a program works on at a time, what it is compiled for, and on which grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import triton

from ipa_bridge.kernels import INTERPRETED, Chunk, Sizes, point_attention

KERNELS: dict[str, Any] = {
    name: getattr(point_attention, name)
    for name in ("logits", "attend_to_pair", "attend", "pair_gradients", "query_gradients", "key_gradients")
}


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
    "key_gradients": Tiles(16, 32, 8, 2),
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


def options_of(tile: Tiles) -> dict[str, Any]:
    """Of Triton's compiler."""
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def constants(
    kernel: str, sizes: Sizes, *, pair_dtype: str | None, has_mask: bool, backward: bool, d_pair: bool
) -> dict[str, Any]:
    """What a kernel is compiled for, by argument."""
    tile = tiles(kernel, sizes, pair_dtype)
    known = {
        "HEADS": sizes.heads,
        "CHANNELS": sizes.channels,
        "COORDINATES": sizes.coordinates,
        "VALUES": sizes.values,
        "WIDTH": sizes.pair_channel or 16,
        "PADDED_CHANNELS": max(16, triton.next_power_of_2(sizes.channels)),
        "PADDED_COORDINATES": triton.next_power_of_2(sizes.coordinates),
        "PADDED_VALUES": max(16, triton.next_power_of_2(sizes.values)),
        "HAS_MASK": has_mask,
        "HAS_PAIR": pair_dtype is not None,
        "BACKWARD": backward,
        "WITH_D_PAIR": d_pair,
        "ROWS": tile.rows,
        "KEYS": tile.keys,
        "INTERPRETED": INTERPRETED,
    }
    return {name: known[name] for name in KERNELS[kernel].arg_names if name in known}


def grid(kernel: str, sizes: Sizes, chunk: Chunk, tile: Tiles) -> tuple[int, ...]:
    """How many programs a chunk takes."""
    heads = chunk.examples * sizes.heads
    by_row, by_key = triton.cdiv(chunk.rows, tile.rows), triton.cdiv(sizes.number, tile.keys)
    if kernel == "logits":
        return by_key, by_row, heads
    if kernel in ("attend_to_pair", "pair_gradients"):
        return (chunk.examples * chunk.rows,)
    return by_key if kernel == "key_gradients" else by_row, heads


def run(kernel: str, arrays: Mapping[str, Any], sizes: Sizes, chunk: Chunk, **options: Any) -> None:
    """Launches a kernel on a chunk; of the arrays, by name, it takes those that it has arguments for."""
    known = {**arrays, **chunk._asdict(), "number": sizes.number}
    tile = tiles(kernel, sizes, options["pair_dtype"])
    function = KERNELS[kernel]
    compiled_for = constants(kernel, sizes, **options)
    given = {name: known[name] for name in function.arg_names if name not in compiled_for}
    function[grid(kernel, sizes, chunk, tile)](**given, **compiled_for, **options_of(tile))
