"""Blocks of query rows: their rows of the pair, their logits and attention."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ipa_bridge.tiling import default_block_size
from ipa_torch.attention.masks import HIDDEN, hides
from ipa_torch.attention.operands import Operands

BLOCK_BYTES = 6 << 20
"""Bytes of the pair in one block. All sizes from 4 to 8 MB are about as fast, since a block stays in cache."""

SMALLEST_WEIGHT = 1e-30
"""Smaller attention weights become zero: they add nothing, and subnormal numbers slow products on CPU threefold."""


class Blocks:
    """One example's operands as its blocks need them, and buffers that the blocks share."""

    def __init__(self, operands: Operands, distance_epsilon: float | None) -> None:
        self.queries, self.keys, self.values, self.query_points, self.key_points = operands[:5]
        self.weights, self.pair, mask = operands.weights, operands.pair, operands.mask
        self.mask, self.allowed, self.distance_epsilon = mask, operands.allowed, distance_epsilon
        self.bias = None if operands.bias is None else operands.bias.T.contiguous()
        self.in_float64 = (
            distance_epsilon is None and self.queries.dtype == torch.float32 and self.queries.device.type == "cpu"
        )
        self.buffers: dict[str, Tensor] = {}
        left, right = self.queries, self.keys
        if mask is not None:  # one more channel: 1e5·m_i·(m_j − 1), exactly zero where the key is valid
            row = mask[None, :, None].expand(len(left), -1, 1)
            left, right = torch.cat([left, row], -1), torch.cat([right, 1e5 * (row - 1)], -1)
        self.left, self.right = left, right.transpose(1, 2).contiguous()
        if self.in_float64:
            self.wide_queries, self.wide_keys = self.query_points.double(), self.key_points.double()
            weight = self.weights.double()[:, None, None]
            length2 = [torch.sum(x * x, -1, keepdim=True) for x in (self.wide_queries, self.wide_keys)]
            one = torch.ones_like(length2[0])
            self.wide_left = torch.cat([self.wide_queries, -0.5 * length2[0], -0.5 * one], -1) * weight
            self.wide_right = torch.cat([self.wide_keys, one, length2[1]], -1).transpose(1, 2).contiguous()

    def rows(self, block_size: int) -> list[slice]:
        """Query rows of each block; block_size 0 means the default."""
        number, width = self.queries.shape[1], 0 if self.pair is None else self.pair.shape[-1]
        on_gpu = self.queries.device.type == "cuda"
        block_size = block_size or default_block_size(
            number, len(self.queries), width, block_bytes=BLOCK_BYTES, on_gpu=on_gpu
        )
        return [slice(start, min(start + block_size, number)) for start in range(0, number, block_size)]

    def scratch(self, name: str, shape: Sequence[int]) -> Tensor:
        """Buffer that one block after the other reuses."""
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = self.queries.new_empty(size)
        return self.buffers[name][:size].view(shape)

    def pair_rows(self, rows: slice) -> Tensor | None:
        """These rows of the pair, in the dtype of the arithmetic."""
        return None if self.pair is None else self.pair[rows].to(self.queries.dtype)

    def bias_logits(self, pair_rows: Tensor | None) -> Tensor | None:
        """The pair's part of the rows' logits, (H, b, N)."""
        if self.bias is None or pair_rows is None:
            return None
        number, keys, _ = pair_rows.shape
        logits = self.scratch("bias", (number, len(self.bias), keys))
        torch.bmm(self.bias.expand(number, -1, -1), pair_rows.transpose(1, 2), out=logits)
        return logits.transpose(0, 1)

    def beside_bias(self, rows: Tensor) -> Tensor:
        """[W_bᵀ; rows] of each query, (b, 2H, c_z), or rows alone without a bias."""
        rows = rows.to(self.queries.dtype)
        return rows if self.bias is None else torch.cat([self.bias.expand(len(rows), -1, -1), rows], 1)

    def logits(self, rows: slice, bias_logits: Tensor | None) -> Tensor:
        """The rows' logits, (H, b, N)."""
        left = self.left[:, rows]
        shape = (*left.shape[:2], self.right.shape[-1])
        logits = torch.bmm(left, self.right, out=self.scratch("logits", shape))
        if bias_logits is not None:
            logits += bias_logits
        if self.in_float64:
            logits += torch.bmm(self.wide_left[:, rows], self.wide_right)
        else:
            logits.addcmul_(self.distances(rows), self.weights[:, None, None], value=-0.5)
        if self.allowed is not None:
            allowed = self.allowed if len(self.allowed) == 1 else self.allowed[rows]
            logits.masked_fill_(hides(allowed, None if self.mask is None else self.mask[rows], self.mask), HIDDEN)
        return logits

    def distances(self, rows: slice) -> Tensor:
        """Sums over points of the squared distances, or of the distances, (H, b, N)."""
        total = self.queries.new_zeros((len(self.queries), rows.stop - rows.start, self.keys.shape[1]))
        if self.distance_epsilon is None:
            for offset in self.offsets(rows):
                total.addcmul_(offset, offset)
            return total
        for _, length in self.points(rows):
            total += length
        return total

    def attention(self, rows: slice, bias_logits: Tensor | None) -> Tensor:
        """Softmax of the rows' logits, (H, b, N)."""
        logits = self.logits(rows, bias_logits)
        weight = torch.softmax(logits, -1, out=self.scratch("weight", logits.shape))
        return torch.threshold_(weight, SMALLEST_WEIGHT, 0.0)

    def points(self, rows: slice) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """Differences q − k in x, y and z, and their length √(|q − k|² + ε), of one point after the other."""
        offsets = self.offsets(rows)
        for x, y, z in zip(offsets, offsets, offsets, strict=True):
            yield (x, y, z), torch.sqrt(x * x + y * y + z * z + (self.distance_epsilon or 0.0))

    def offsets(self, rows: slice) -> Iterator[Tensor]:
        """Differences q − k, one tensor (H, b, N) per coordinate of each point."""
        for q, k in zip(self.query_points[:, rows].unbind(-1), self.key_points.unbind(-1), strict=True):
            yield q[:, :, None] - k[:, None, :]
