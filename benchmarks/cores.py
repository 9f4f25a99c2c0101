"""Calls of the attention's core, `point_attention`: ours, the textbook (eager or compiled), and PyTorch's attention.

The module needs PyTorch, and JAX for the calls in JAX. It does not need Haiku.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks.calls import Call, Calls, as_jax, jax_calls, torch_calls
from benchmarks.systems import Inputs
from ipa_bridge.config import Implementation, IPAConfig
from ipa_bridge.proteins.frames import random_frames
from ipa_parity.frameworks import jax_point_attention


class Case(NamedTuple):
    """One measurement: length, pair and device."""

    residues: int
    pair: str
    """The pair's dtype, or "none"."""
    device: str


def core_inputs(case: Case) -> dict[str, Any]:
    """Random arguments of `point_attention` on the device; all but the mask require gradients. Systems share them."""
    return dict(_core_inputs(case))


@lru_cache(maxsize=1)
def _core_inputs(case: Case) -> dict[str, Any]:
    import torch

    c = IPAConfig.alphafold2()
    n, h = case.residues, c.num_head
    generator = torch.Generator(case.device).manual_seed(n)

    def draw(*shape: int, dtype: Any = torch.float32) -> Any:
        return torch.randn(shape, generator=generator, device=case.device, dtype=dtype).requires_grad_()

    has_pair, width = case.pair != "none", c.pair_channel or 0
    return {
        "q": draw(n, h, c.num_scalar_qk),
        "k": draw(n, h, c.num_scalar_qk),
        "v": draw(n, h, c.num_scalar_v),
        "q_points": draw(n, h, c.num_point_qk, 3),
        "k_points": draw(n, h, c.num_point_qk, 3),
        "v_points": draw(n, h, c.num_point_v, 3),
        "pair": draw(n, n, width, dtype=getattr(torch, case.pair)) if has_pair else None,
        "pair_bias_weight": draw(width, h) if has_pair else None,
        "point_weights": torch.ones(h, device=case.device).requires_grad_(),
        "mask": (torch.rand(n, generator=generator, device=case.device) > 0.1).float(),
    }


def differentiated(arrays: dict[str, Any]) -> list[Any]:
    """The arrays that require gradients."""
    return [x for name, x in arrays.items() if x is not None and name != "mask"]


def torch_attend(arrays: dict[str, Any], implementation: Implementation) -> list[Any]:
    """The outputs of our core in PyTorch, None left out."""
    import ipa_torch

    return [x for x in ipa_torch.point_attention(**arrays, implementation=implementation) if x is not None]


def module_inputs(case: Case) -> Inputs:
    """Random arguments of a whole attention module on the device; the pair is the one of `core_inputs`."""
    import torch

    c = IPAConfig.alphafold2()
    n = case.residues
    generator = torch.Generator(case.device).manual_seed(n)
    options: dict[str, Any] = {"generator": generator, "device": case.device}
    frames = random_frames(np.random.default_rng(n), (n,), spread=2.0)
    rotation, translation = (torch.from_numpy(x.astype(np.float32)).to(case.device) for x in frames)
    single = torch.randn((n, c.num_channel), **options).requires_grad_()
    pair = None
    if case.pair != "none":
        pair = core_inputs(case)["pair"]
    mask = (torch.rand(n, **options) > 0.1).float()
    return Inputs(single, pair, rotation, translation, mask, aatype=None)


def torch_core(implementation: Implementation, case: Case) -> Calls:
    """Calls of our core in PyTorch."""
    arrays = core_inputs(case)
    return torch_calls(partial(torch_attend, arrays, implementation), differentiated(arrays))


def compiled_textbook(case: Case) -> Calls:
    """Calls of the reference under `torch.compile`."""
    import torch

    torch._dynamo.reset()
    arrays = core_inputs(case)
    compiled = torch.compile(partial(torch_attend, arrays, "reference"), dynamic=False)
    return torch_calls(compiled, differentiated(arrays))


def torch_sdpa(case: Case) -> Calls:
    """Calls of `scaled_dot_product_attention` for attention without a pair: extra channels hold the distances.

    Queries and keys have 30 channels, values 40. The accuracy that this loses to cancellation is not checked.
    """
    import torch
    import torch.nn.functional as F

    x = core_inputs(case)

    def forward() -> list[Any]:
        q, k, v = (y.transpose(0, 1)[None] for y in (x["q"], x["k"], x["v"]))
        weight = (x["point_weights"] / math.sqrt(4.5 * x["q_points"].shape[-2]))[:, None, None]
        ends = [y.flatten(-2).transpose(0, 1)[None] for y in (x["q_points"], x["k_points"])]
        ones = torch.ones_like(q[..., :1])
        lengths = [-0.5 * weight * (y * y).sum(-1, keepdim=True) for y in ends]
        left = torch.cat([q / math.sqrt(q.shape[-1]), weight * ends[0], lengths[0], ones], -1)
        right = torch.cat([k, ends[1], ones, lengths[1]], -1)
        values = torch.cat([v, x["v_points"].flatten(-2).transpose(0, 1)[None]], -1)
        width = max(left.shape[-1], values.shape[-1])
        left, right, values = (F.pad(y, (0, width - y.shape[-1])) for y in (left, right, values))
        mask = x["mask"].bool()[None, None, None]
        return [F.scaled_dot_product_attention(left, right, values, attn_mask=mask, scale=math.sqrt(0.5))]

    return torch_calls(forward, differentiated(x))


def in_graphs(prepare: Callable[[Case], Calls], case: Case) -> Calls:
    """The same calls, captured in CUDA graphs and replayed."""
    return {direction: partial(capture, ready) for direction, ready in prepare(case).items()}


def capture(ready: Callable[[], Call]) -> Call:
    """The prepared call, to be captured in a CUDA graph at its first use."""
    return Captured(ready())


class Captured:
    """A call that is captured in a CUDA graph at its first use and replayed afterwards."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.graph: Any = None

    def __call__(self) -> Any:
        """Captures the call if needed, replays it and returns its result."""
        import torch

        if self.graph is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self.call()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                self.result = self.call()
            self.graph = graph
        self.graph.replay()
        return self.result


def jax_core(implementation: Implementation, case: Case) -> Calls:
    """Calls of our core in JAX."""
    attend = jax_point_attention()
    arrays = {name: as_jax(x) for name, x in core_inputs(case).items()}
    mask = arrays.pop("mask")

    def forward(arrays: Any, mask: Any) -> Any:
        return attend(**arrays, mask=mask, implementation=implementation)

    return jax_calls(forward, (arrays,), (mask,))
