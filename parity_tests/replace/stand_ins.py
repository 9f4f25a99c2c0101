"""Layers with the parameters and calls of other systems, computed by numpy, and the judgement of replaced ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ipa_bridge.config import IPAConfig
from ipa_bridge.weights import Weights, semantics
from ipa_bridge.weights.dialects import find_dialect
from ipa_parity.attention.cases import ODD, make_case
from ipa_parity.report import compare

torch = pytest.importorskip("torch")
from torch import nn

import ipa_torch

ONE_WIDTH = replace(ODD, num_scalar_v=ODD.num_scalar_qk)


class Rotation:
    """OpenFold's Rotation, which casts to float32."""

    def __init__(self, rot_mats, quats=None):
        assert quats is None
        self.rot_mats = rot_mats.float()

    def get_rot_mats(self):
        return self.rot_mats


class Rigid:
    """OpenFold's Rigid."""

    def __init__(self, rots, trans):
        self.rots, self.trans = rots, trans.float()

    def get_rots(self):
        return self.rots

    def get_trans(self):
        return self.trans


class Array:
    def __init__(self, x):
        self.x = x

    def to_tensor(self):
        return self.x


class Rigid3Array:
    """Rigid of OpenFold's multimer models."""

    def __init__(self, rotation, translation):
        self.rotation, self.translation = Array(rotation), Array(translation)

    @classmethod
    def from_tensor_4x4(cls, x):
        return cls(x[..., :3, :3], x[..., :3, 3])


class OpenFold(nn.Module):
    """A layer with OpenFold's signature and parameter names; float64 numpy computes it from OpenFold's conventions.

    Gradients are our module's, which the rest of the suite checks against numpy's complex steps.
    """

    dialect = "openfold"

    def __init__(self, config: IPAConfig, *, eps: float = 1e-8) -> None:
        super().__init__()
        self.function, self.eps, self.inf = replace(config, norm_epsilon=eps), eps, 1e5
        for name, (theirs, transform) in find_dialect(self.dialect).names(config).items():
            if theirs.endswith(".weight"):
                *inner, layer, _ = theirs.split(".")
                bias = name.replace("/weights", "/bias") in find_dialect(self.dialect).names(config)
                linear = nn.Linear(*transform.their_shape[::-1], bias=bias)
                parent = self
                for step in inner:
                    parent = parent._modules.setdefault(step, nn.Module())
                parent.add_module(layer, linear)
        self.head_weights = nn.Parameter(torch.zeros(config.num_head))

    def forward(
        self, s, z, r, mask, inplace_safe=False, _offload_inference=False, _z_reference_list=None
    ) -> torch.Tensor:
        if isinstance(r, Rigid3Array):
            rotation, translation = r.rotation.to_tensor(), r.translation.to_tensor()
        else:
            rotation, translation = r.get_rots().get_rot_mats(), r.get_trans()
        state = {name: x for name, x in self.state_dict().items() if not name.startswith("linear_rbf")}
        p = {name: x.double().numpy() for name, x in state.items()}
        arrays = (x.detach().double().numpy()[0] for x in (s, z, rotation, translation, mask))
        out = torch.from_numpy(semantics.attention(self.dialect, p, self.function, *arrays))[None].to(s.dtype)
        ours = ipa_torch.InvariantPointAttention(self.function).to(s.dtype)
        ours.load_state_dict(Weights.from_torch(state, dialect=self.dialect, config=self.function).to_torch())
        linked = ours(s, z, ipa_torch.Rigid(rotation, translation), mask)
        return out + (linked - linked.detach())


class OpenFold1(OpenFold):
    dialect = "openfold_v1"


class FrameFlow(OpenFold):
    dialect = "frameflow"

    def forward(self, s, z, r, mask, _offload_inference=False, _z_reference_list=None) -> torch.Tensor:
        return super().forward(s, z, r, mask)


class FrameDiff(FrameFlow):
    """FrameDiff's and FoldFlow's classes; their checkpoints hold a layer that no forward pass calls."""

    dialect = "framediff"

    def __init__(self, config, width=20):
        super().__init__(config)
        self.linear_rbf = nn.Linear(width, 1)


class MultiFlow(FrameFlow):
    """MultiFlow's call; its softmax and its dropout are modules."""

    def __init__(self, config, dropout=0.0):
        super().__init__(config)
        self.softmax, self.dropout, self.dropout_prob = nn.Softmax(-1), nn.Dropout(dropout), dropout

    def forward(self, s, z, r, mask, attention_mask=None, _offload_inference=False, _z_reference_list=None):
        assert attention_mask is None
        return super().forward(s, z, r, mask)


class FlashIPA(FrameFlow):
    """FlashIPA's call; the arguments of its flash mode come before the frames."""

    def __init__(self, config, use_flash_attn=False):
        super().__init__(config)
        self.use_flash_attn = use_flash_attn

    def forward(self, s, z, z_factor_1, z_factor_2, r, mask, _offload_inference=False, _z_reference_list=None):
        assert z_factor_1 is None
        assert z_factor_2 is None
        return super().forward(s, z, r, mask)


class OpenFoldMultimer(OpenFold):
    """OpenFold 2's monomer class with is_multimer; its norm has another form than in the multimer class."""

    def __init__(self, config):
        super().__init__(replace(config, norm_form="add"))


class TFold(OpenFold1):
    """tFold's call; it cannot multiply float32 frames with float64 points."""

    def forward(self, s, z=None, r=None, mask=None):
        if s.dtype is torch.float64:
            raise RuntimeError("expected scalar type Float but found Double")
        return super().forward(s, z, r, torch.ones(s.shape[:-1]) if mask is None else mask)


class FastFold(OpenFold1):
    """FastFold's call, which takes neither a batch axis nor float64."""

    def forward(self, s, z, r, mask):
        if s.ndim != 2 or s.dtype is torch.float64:
            raise RuntimeError("number of dimensions in the tensor input does not match")
        batched = Rigid(Rotation(r.get_rots().get_rot_mats()[None]), r.get_trans()[None])
        return super().forward(s[None], z[None], batched, mask[None])[0]


DOWN_Z = replace(ONE_WIDTH, pair_channel=8, pair_value_channel=2)


MULTIMER = replace(ONE_WIDTH, layout="multimer", scalar_bias=False, norm_form="clamp")


STAND_INS = {
    "OpenFold 2": (OpenFold, ONE_WIDTH),
    "OpenFold 2 multimer": (OpenFold, MULTIMER),
    "OpenFold 1": (OpenFold1, ONE_WIDTH),
    "FrameFlow": (FrameFlow, DOWN_Z),
    "FrameDiff": (FrameDiff, DOWN_Z),
    "FrameFlow, MultiFlow": (MultiFlow, DOWN_Z),
    "FrameFlow, FlashIPA": (FlashIPA, DOWN_Z),
    "OpenFold 2 multimer, by the other class": (OpenFoldMultimer, MULTIMER),
}


def rigids(case):
    tensors = [torch.from_numpy(x) for x in (case.rotation, case.translation)]
    return Rigid3Array(*tensors) if case.config.layout == "multimer" else Rigid(Rotation(tensors[0]), tensors[1])


def stand_in(which: str, dtype=np.float32):
    """A layer with weights, inputs, and our own module with the same weights."""
    kind, config = STAND_INS[which]
    case = make_case(which, config, (1, 7)).astype(np.dtype(dtype).name)
    layer = kind(config).to(torch.from_numpy(case.single).dtype)
    layer.load_state_dict(case.weights.to_torch(dialect=kind.dialect))
    config = layer.function
    ours = ipa_torch.InvariantPointAttention(config).to(layer.head_weights.dtype)
    ours.load_state_dict(case.weights.to_torch())
    return layer, ours, case


def judge(actual, expected, mask, stage="out", dtype="float64", **options):
    actual, expected = (x.detach().numpy() if isinstance(x, torch.Tensor) else x for x in (actual, expected))
    meaningful = None if mask is None else np.broadcast_to(mask[..., None], actual.shape)
    names = {"case": "replaced", "stage": stage, "dtype": dtype, "subject": "after", "reference": "before"}
    row = compare(actual, expected, **names, meaningful=meaningful, **options)
    assert row.passed, str(row)
