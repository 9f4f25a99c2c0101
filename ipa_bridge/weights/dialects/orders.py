"""Orders of features in our arrays and in theirs, and the permutation of one array into the other."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ipa_bridge.config import IPAConfig


@dataclass(frozen=True)
class Order:
    """The order of the same features in our form and in theirs.

    An order is one or more groups, separated by bars. The letters of a group are its axes, outermost first; `sizes`
    gives their sizes. For example, "c h q" is coordinate, then head, then query point. Each group of theirs is the
    first group of ours with the same letters that no earlier group is. Groups of theirs that are joined by a plus are
    concatenated along their last axis; "1" is an axis of size one. For example, "h p 1+h p c" is a point's length
    before its three coordinates.
    """

    ours: str
    theirs: str

    def indices(self, config: IPAConfig) -> np.ndarray:
        """Positions of their features in ours: theirs[k] = ours[indices[k]]."""
        start, remaining = 0, []
        for group, width in zip(self.ours.split("|"), self.widths(config), strict=True):
            axes = group.split()
            shape = [sizes(config)[axis] for axis in axes]
            remaining.append((axes, np.arange(start, start + width).reshape(shape)))
            start += width

        def block(group: str) -> np.ndarray:
            axes = group.split()
            letters = [axis for axis in axes if axis != "1"]
            found = next(i for i, (ours, _) in enumerate(remaining) if sorted(ours) == sorted(letters))
            ours, positions = remaining.pop(found)
            positions = positions.transpose([ours.index(axis) for axis in letters])
            return np.expand_dims(positions, [i for i, axis in enumerate(axes) if axis == "1"])

        joined = ([block(group) for group in groups.split("+")] for groups in self.theirs.split("|"))
        return np.concatenate([np.concatenate(blocks, -1).reshape(-1) for blocks in joined])

    def widths(self, config: IPAConfig) -> list[int]:
        """Number of features in each group of ours."""
        size = sizes(config)
        return [math.prod(size[axis] for axis in group.split()) for group in self.ours.split("|")]


def sizes(config: IPAConfig) -> dict[str, int]:
    """Sizes of the axes that the letters of an `Order` stand for."""
    return {
        "c": 3,
        "h": config.num_head,
        "d": config.num_scalar_qk,
        "s": config.num_scalar_v,
        "q": config.num_point_qk,
        "p": config.num_point_v,
        "w": config.num_point_qk + config.num_point_v,
        "z": config.pair_value_channel or config.pair_channel or 0,
    }


@dataclass(frozen=True)
class Transform:
    """One parameter's array from our form into theirs and back, bit for bit."""

    shape: tuple[int, ...]
    """Shape of our array: inputs first, heads unflattened in the multimer layout."""
    turned: bool = False
    """True for a linear layer's weight, which is transposed: their outputs come first."""
    outputs: np.ndarray | None = None
    inputs: np.ndarray | None = None
    flat: bool = True
    packed: int | None = None
    """Number of outputs of their array if it packs several of ours; `outputs` are then the positions of this one's."""

    @property
    def their_shape(self) -> tuple[int, ...]:
        """Shape of their array."""
        if self.turned:
            return self.packed or math.prod(self.shape[1:]), self.shape[0]
        return (self.packed or math.prod(self.shape),) if self.flat else self.shape

    def apply(self, ours: np.ndarray, theirs: np.ndarray | None = None) -> np.ndarray:
        """Turns our array into theirs.

        Args:
            ours: our array.
            theirs: their array with the parts that were applied before; None for the first part or the only one.
        """
        if not self.flat:
            return ours
        x = ours.reshape(len(ours), -1).T if self.turned else ours.reshape(-1)
        if self.packed:
            whole = np.zeros(self.their_shape, ours.dtype) if theirs is None else theirs
            whole = whole.astype(np.promote_types(whole.dtype, ours.dtype))
            whole[self.outputs] = x
            return whole
        x = x if self.outputs is None else x[self.outputs]
        return np.ascontiguousarray(x if self.inputs is None else x[:, self.inputs])

    def invert(self, theirs: np.ndarray) -> np.ndarray:
        """Turns their array into ours.

        Raises:
            ValueError: their array does not have `their_shape`.
        """
        if theirs.shape != self.their_shape:
            raise ValueError(f"must be {self.their_shape}, got {theirs.shape}")
        if not self.flat:
            return theirs
        x = theirs
        if self.packed:
            x = theirs[self.outputs]
        elif self.outputs is not None:
            x = np.empty_like(theirs)
            x[self.outputs] = theirs
        if self.inputs is not None:
            x, permuted = np.empty_like(x), x
            x[:, self.inputs] = permuted
        return np.ascontiguousarray((x.T if self.turned else x).reshape(self.shape))
