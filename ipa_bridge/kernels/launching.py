"""How the kernels are launched: what a program works on at a time, what it is compiled for, and on which grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton

from ipa_bridge.kernels import INTERPRETED, Chunk, Sizes, Tiles, point_attention, stride, tiles

KERNELS: dict[str, Any] = {
    name: getattr(point_attention, name)
    for name in ("logits", "attend_to_pair", "attend", "pair_gradients", "query_gradients", "key_gradients")
}


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
    known = {**arrays, **chunk._asdict(), "number": sizes.number, "stride": stride(sizes)}
    tile = tiles(kernel, sizes, options["pair_dtype"])
    function = KERNELS[kernel]
    compiled_for = constants(kernel, sizes, **options)
    given = {name: known[name] for name in function.arg_names if name not in compiled_for}
    function[grid(kernel, sizes, chunk, tile)](**given, **compiled_for, **options_of(tile))
