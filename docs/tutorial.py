# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Invariant point attention, line by line
#
# AlphaFold 2 turns its representations of a protein into coordinates with an attention that looks at three things at
# once: what two residues *are* (as any transformer does), what is known of them *as a pair*, and where they *lie in
# space*. Its output does not change when the whole protein is rotated or moved. This invariance is exact, not learned.
# The attention is called invariant point attention, IPA (Jumper et al., *Nature* 596 (2021) 583, Supplementary
# Information, Algorithm 22).
#
# This notebook shows its eleven lines, each in JAX with Haiku and in PyTorch, on the same numbers. After each line it
# asserts that the shapes and values of the two are the same. Then it explains the constants, and shows pictures of what
# the attention does.
#
# `pip install '.[notebook]' jupyterlab` in the repository installs what the notebook needs. Put
# [2rbg.pdb](https://files.rcsb.org/download/2rbg.pdb) in a folder and set `IPA_STRUCTURES` to this folder. Without the
# file, an idealised peptide is used instead.

# %%
import math
import os
from dataclasses import replace
from pathlib import Path

import haiku as hk
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import torch

import ipa_jax
import ipa_torch
from ipa_bridge import IPAConfig, Weights, load_structure
from ipa_bridge.proteins.frames import idealised_peptide, random_rotations
from ipa_bridge.tolerance import bound

jax.config.update("jax_default_matmul_precision", "highest")  # an accelerator would round the factors of its products
rng = np.random.default_rng(0)
epsilon = np.finfo(np.float32).eps
INK, BLUE, ORANGE, GREEN, GREY = "#1b1b1b", "#2f6fb0", "#d9822b", "#3a8f5c", "#b9b9b9"
plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True, "axes.titlesize": 10, "font.size": 9})

# %% [markdown]
# ## What goes in
#
# | | | shape |
# |---|---|---|
# | $s_i$ | single representation: what is known of residue $i$ | $N \times c_s$ |
# | $z_{ij}$ | pair representation: what is known of residues $i$ and $j$ together | $N \times N \times c_z$ |
# | $T_i = (R_i, \vec t_i)$ | frame of residue $i$: a rotation and a position | $N \times 3 \times 3$, $N \times 3$ |
#
# The attention has these sizes:
#
# | | | here | AlphaFold 2 |
# |---|---|---:|---:|
# | $c_s$, $c_z$ | channels of the two representations | 768, 128 | 384, 128 |
# | $H$ | heads | 12 | 12 |
# | $C$ | channels of a scalar query, key or value, per head | 16 | 16 |
# | $P$ | query and key points, per head | 4 | 4 |
# | $P_v$ | value points, per head | 4 | 8 |
#
# As in the paper (`LinearNoBias`), the projections of queries, keys and values have no bias here. In AlphaFold's
# monomer weights they have one.

# %%
config = replace(IPAConfig.lucidrains(768, heads=12, pairwise_repr_dim=128), frame_unit=10.0)  # Å
c_s, c_z, H = config.num_channel, config.pair_channel, config.num_head
C, P, Pv = config.num_scalar_qk, config.num_point_qk, config.num_point_v
assert config.num_scalar_v == C
print(f"c_s = {c_s}, c_z = {c_z}, H = {H}, C = {C}, P = {P}, Pv = {Pv}")

# %% [markdown]
# A residue's **frame** has its origin at the Cα atom; the x-axis points to C, and N lies in the x-y plane. A point with
# coordinates $\vec x$ in residue $i$'s frame has, in the protein's frame, the coordinates
#
# $$T_i \circ \vec x = R_i \vec x + \vec t_i.$$
#
# As in AlphaFold, positions are in units of 10 Å, so that all numbers are about one.

# %%
file = Path(os.environ.get("IPA_STRUCTURES", ".")) / "2rbg.pdb"
structure = load_structure(file) if file.exists() else idealised_peptide()
chain = structure.chain_id == structure.chain_id[0]
rotation, translation = (x[chain] for x in structure.rigids(config))
R = rotation.astype(np.float32)  # (N, 3, 3)
t = (translation - translation.mean(0)).astype(np.float32)  # (N, 3), 10 Å
aatype = structure.aatype[chain]
N = len(aatype)
print(f"{structure.name}: {N} residues in its first chain" + ("" if file.exists() else f" (there is no {file})"))

# %% [markdown]
# There is no trained network before the attention here, so the representations are simple. The single representation
# is a random vector for each kind of amino acid; the pair representation is a random vector for each distance $j - i$
# along the chain, up to 32. Every entry has mean 0 and variance 1, as after the layer norms of a real model.

# %%
amino_acids = rng.standard_normal((21, c_s), dtype=np.float32)
offsets = rng.standard_normal((65, c_z), dtype=np.float32)
s = amino_acids[aatype]  # (N, c_s)
z = offsets[np.clip(np.arange(N)[None, :] - np.arange(N)[:, None], -32, 32) + 32]  # (N, N, c_z)
print("s", s.shape, " z", z.shape, " R", R.shape, " t", t.shape)

# %% [markdown]
# ## Weights for both
#
# A linear layer computes $xW + b$ in Haiku and $xW^\top + b$ in PyTorch: the weights are the same numbers, transposed.
# They are drawn with variance 1 / fan-in, so that a projection of numbers of variance 1 has variance 1 again (LeCun's
# initialisation, which AlphaFold uses).


# %%
def draw(inputs: int, outputs: int) -> np.ndarray:
    return rng.standard_normal((inputs, outputs), dtype=np.float32) / math.sqrt(inputs)


features = H * (C + 4 * Pv + c_z)
weights = {
    **{f"{x}_scalar_projection": draw(c_s, H * C) for x in "qkv"},
    **{f"{x}_point_projection": draw(c_s, H * 3 * n) for x, n in zip("qkv", (P, P, Pv), strict=True)},
    "attention_2d": draw(c_z, H),
    "output_projection": draw(features, c_s),
}


def with_haiku(line, *inputs):
    """Calls a function of Haiku modules with these weights."""
    params = {name: {"w": jnp.asarray(w)} for name, w in weights.items()}
    return hk.without_apply_rng(hk.transform(line)).apply(params, *inputs)


def torch_linear(name: str) -> torch.nn.Linear:
    """A layer of PyTorch with these weights."""
    layer = torch.nn.Linear(*weights[name].shape, bias=False)
    layer.weight.data = torch.from_numpy(weights[name].T)
    return layer


SIZES = {"N": N, "H": H, "C": C, "P": P, "Pv": Pv, "3": 3, "c_s": c_s, "c_z": c_z, "features": features}


def same(name: str, haiku: jax.Array, pytorch: torch.Tensor, shape: str) -> None:
    """Prints the shape; both must have it, and the same values to a few roundings (epsilon is 1.2e-7)."""
    a, b = np.asarray(haiku), pytorch.detach().numpy()
    expected = tuple(SIZES[axis] for axis in shape.split())
    assert a.shape == b.shape == expected, (name, a.shape, b.shape, expected)
    difference = np.abs(a - b).max() / np.abs(b).max() / epsilon
    assert difference <= bound("out", "float32"), (name, difference)
    print(f"{name:6} ({', '.join(shape.split())}) = {a.shape}, to {math.ceil(difference)} eps")


torch.set_grad_enabled(False)
s_jax, z_jax, R_jax, t_jax = (jnp.asarray(x) for x in (s, z, R, t))
s_torch, z_torch, R_torch, t_torch = (torch.from_numpy(x) for x in (s, z, R, t))

# %% [markdown]
# ## The eleven lines
#
# **Line 1.** Scalar queries, keys and values, as in any attention: every head has its own $C$ channels.
#
# $$\mathbf q_i^h,\ \mathbf k_i^h,\ \mathbf v_i^h = \mathrm{LinearNoBias}(s_i)$$

# %%
# Haiku
q, k, v = with_haiku(
    lambda s: [hk.Linear(H * C, with_bias=False, name=f"{x}_scalar_projection")(s).reshape(N, H, C) for x in "qkv"],
    s_jax,
)
# PyTorch
q_, k_, v_ = (torch_linear(f"{x}_scalar_projection")(s_torch).reshape(N, H, C) for x in "qkv")

for name, haiku, pytorch in zip("qkv", (q, k, v), (q_, k_, v_), strict=True):
    same(name, haiku, pytorch, "N H C")

# %% [markdown]
# **Lines 2 and 3.** Every head of every residue also places *points* in space: $P$ query points, $P$ key points and
# $P_v$ value points. The linear layer gives coordinates in the residue's own frame: they mean "2 Å in front of my Cα",
# whichever way the residue faces.
#
# $$\vec{\mathbf q}_i^{hp},\ \vec{\mathbf k}_i^{hp},\ \vec{\mathbf v}_i^{hp} = \mathrm{LinearNoBias}(s_i) \in
# \mathbb R^3$$
#
# The numbers of a head lie in memory with all x first, then all y, then all z.


# %%
# Haiku
def points(s, letter, number):
    flat = hk.Linear(H * 3 * number, with_bias=False, name=f"{letter}_point_projection")(s)
    return jnp.swapaxes(flat.reshape(N, H, 3, number), -1, -2)


q_local, k_local, v_local = with_haiku(lambda s: [points(s, "q", P), points(s, "k", P), points(s, "v", Pv)], s_jax)
# PyTorch
q_local_, k_local_, v_local_ = (
    torch_linear(f"{letter}_point_projection")(s_torch).reshape(N, H, 3, number).transpose(-1, -2)
    for letter, number in zip("qkv", (P, P, Pv), strict=True)
)

same("q⃗", q_local, q_local_, "N H P 3")
same("k⃗", k_local, k_local_, "N H P 3")
same("v⃗", v_local, v_local_, "N H Pv 3")

# %% [markdown]
# Lines 7 and 10 need all points in one common frame, the protein's: $T_i \circ \vec x = R_i \vec x + \vec t_i$.

# %%
# Haiku
q_points, k_points, v_points = (
    jnp.einsum("iab,ihpb->ihpa", R_jax, x) + t_jax[:, None, None] for x in (q_local, k_local, v_local)
)
# PyTorch
q_points_, k_points_, v_points_ = (
    torch.einsum("iab,ihpb->ihpa", R_torch, x) + t_torch[:, None, None] for x in (q_local_, k_local_, v_local_)
)

same("T∘q⃗", q_points, q_points_, "N H P 3")
same("T∘k⃗", k_points, k_points_, "N H P 3")
same("T∘v⃗", v_points, v_points_, "N H Pv 3")

# %% [markdown]
# **Line 4.** From the pair representation comes one number per head: how much $i$ should look at $j$.
#
# $$b_{ij}^h = \mathrm{LinearNoBias}(z_{ij})$$

# %%
# Haiku
b = with_haiku(lambda z: hk.Linear(H, with_bias=False, name="attention_2d")(z), z_jax)
# PyTorch
b_ = torch_linear("attention_2d")(z_torch)

same("b", b, b_, "N N H")

# %% [markdown]
# **Lines 5 and 6.** Two constants, $w_C = \sqrt{2 / 9P}$ and $w_L = \sqrt{1/3}$. They are explained
# [below](#Why-these-constants%3F).

# %%
w_C, w_L = math.sqrt(2 / (9 * P)), math.sqrt(1 / 3)
print(f"w_C = {w_C:.4f}, w_L = {w_L:.4f}")

# %% [markdown]
# **Line 7.** The attention. Three terms decide how much $i$ looks at $j$: how well query and key agree, the pair's
# number, and how *far* the query points of $i$ are from the key points of $j$, both in the protein's frame. Distances
# do not change when the protein rotates or moves, and no other term depends on positions. So the attention does not
# change either.
#
# $$a_{ij}^h = \mathrm{softmax}_j \left( w_L \left( \tfrac{1}{\sqrt C}\, \mathbf q_i^h \cdot \mathbf k_j^h + b_{ij}^h
# - \frac{\gamma^h w_C}{2} \sum_p \left\| T_i \circ \vec{\mathbf q}_i^{hp} - T_j \circ \vec{\mathbf k}_j^{hp} \right\|^2
# \right) \right)$$
#
# $\gamma^h$ is learned, one number per head. It must not be negative, or the head would look at what is far away. So
# the parameter goes through $\mathrm{softplus}(x) = \log(1 + e^x)$, and starts at $\log(e - 1)$, where softplus is 1.

# %%
gamma = np.full(H, math.log(math.e - 1), np.float32)
# Haiku
scalar_term = jnp.einsum("ihc,jhc->hij", q, k) / math.sqrt(C)
pair_term = jnp.moveaxis(b, -1, 0)
squared_distance = jnp.sum((q_points[:, None] - k_points[None]) ** 2, (-1, -2)).transpose(2, 0, 1)
point_term = -jax.nn.softplus(jnp.asarray(gamma))[:, None, None] * w_C / 2 * squared_distance
a = jax.nn.softmax(w_L * (scalar_term + pair_term + point_term), axis=-1)
# PyTorch
scalar_term_ = torch.einsum("ihc,jhc->hij", q_, k_) / math.sqrt(C)
pair_term_ = b_.movedim(-1, 0)
squared_distance_ = torch.sum((q_points_[:, None] - k_points_[None]) ** 2, (-1, -2)).permute(2, 0, 1)
point_term_ = -torch.nn.functional.softplus(torch.from_numpy(gamma))[:, None, None] * w_C / 2 * squared_distance_
a_ = torch.softmax(w_L * (scalar_term_ + pair_term_ + point_term_), dim=-1)

same("scalar", scalar_term, scalar_term_, "H N N")
same("pair", pair_term, pair_term_, "H N N")
same("points", point_term, point_term_, "H N N")
same("a", a, a_, "H N N")

# %% [markdown]
# **Lines 8 to 10.** Three things are summed with these weights: the pair representation itself, the scalar values, and
# the value points. The points are summed in the protein's frame and then brought into the frame of residue $i$, which
# undoes any rotation and motion of the protein: $T_i^{-1} \circ \vec x = R_i^\top (\vec x - \vec t_i)$.
#
# $$\tilde{\mathbf o}_i^h = \sum_j a_{ij}^h z_{ij} \qquad
# \mathbf o_i^h = \sum_j a_{ij}^h \mathbf v_j^h \qquad
# \vec{\mathbf o}_i^{hp} = T_i^{-1} \circ \sum_j a_{ij}^h \left( T_j \circ \vec{\mathbf v}_j^{hp} \right)$$

# %%
# Haiku
o_pair = jnp.einsum("hij,ijc->ihc", a, z_jax)
o = jnp.einsum("hij,jhc->ihc", a, v)
o_global = jnp.einsum("hij,jhpx->ihpx", a, v_points)
o_points = jnp.einsum("iba,ihpb->ihpa", R_jax, o_global - t_jax[:, None, None])
# PyTorch
o_pair_ = torch.einsum("hij,ijc->ihc", a_, z_torch)
o_ = torch.einsum("hij,jhc->ihc", a_, v_)
o_global_ = torch.einsum("hij,jhpx->ihpx", a_, v_points_)
o_points_ = torch.einsum("iba,ihpb->ihpa", R_torch, o_global_ - t_torch[:, None, None])

same("õ", o_pair, o_pair_, "N H c_z")
same("o", o, o_, "N H C")
same("o⃗", o_points, o_points_, "N H Pv 3")

# %% [markdown]
# **Line 11.** All of these, and the lengths of the points, are concatenated and go through one linear layer. In code
# the order is AlphaFold's: scalars, all x, all y, all z, lengths, pair. The lengths have a small number under the root,
# because the root has no finite slope at 0.
#
# $$\tilde s_i = \mathrm{Linear} \left( \mathrm{concat}_{h,p} \left( \tilde{\mathbf o}_i^h,\ \mathbf o_i^h,\
# \vec{\mathbf o}_i^{hp},\ \left\| \vec{\mathbf o}_i^{hp} \right\| \right) \right)$$

# %%
# Haiku
lengths = jnp.sqrt(jnp.sum(o_points**2, -1) + 1e-8)
parts = [o, *jnp.moveaxis(o_points, -1, 0), lengths, o_pair]
f = jnp.concatenate([x.reshape(N, -1) for x in parts], -1)
out = with_haiku(lambda f: hk.Linear(c_s, with_bias=False, name="output_projection")(f), f)
# PyTorch
lengths_ = torch.sqrt(torch.sum(o_points_**2, -1) + 1e-8)
parts_ = [o_, *o_points_.unbind(-1), lengths_, o_pair_]
f_ = torch.cat([x.flatten(1) for x in parts_], -1)
out_ = torch_linear("output_projection")(f_)

same("concat", f, f_, "N features")
same("out", out, out_, "N c_s")

# %% [markdown]
# This is the whole algorithm. The modules of this project are these lines with AlphaFold's parameter names, batches,
# masks and numerical care. With the same weights (stored in Haiku's shapes, and converted to PyTorch) they compute the
# same:

# %%
shapes = {
    **{f"{x}_scalar_projection/weights": (c_s, H, C) for x in "qkv"},
    **{
        f"{x}_point_projection/point_projection/weights": (c_s, H, 3 * n)
        for x, n in zip("qkv", (P, P, Pv), strict=True)
    },
    "attention_2d/weights": (c_z, H),
    "output_projection/weights": (features, c_s),
}
arrays = {name: weights[name.split("/")[0]].reshape(shape) for name, shape in shapes.items()}
arrays |= {"attention_2d/bias": np.zeros(H), "output_projection/bias": np.zeros(c_s), "trainable_point_weights": gamma}
ported = Weights({name: x.astype(np.float32) for name, x in arrays.items()}, config)

module = ipa_torch.InvariantPointAttention(config)
module.load_state_dict(ported.to_torch())
ipa = ipa_jax.transform_ipa(config)
params = ported.to_haiku()

rigids, rigids_ = ipa_jax.Rigid(R_jax, t_jax), ipa_torch.Rigid(R_torch, t_torch)
same("Haiku", jax.jit(ipa.apply)(params, s_jax, z_jax, rigids), out_, "N c_s")
same("torch", out, module(s_torch, z_torch, rigids_), "N c_s")

# %% [markdown]
# **Without a pair representation** there is no line 4 and no $\tilde{\mathbf o}$; line 7 has two terms, and $w_L =
# \sqrt{1/2}$:

# %%
alone = IPAConfig.lucidrains(768, heads=12, require_pairwise_repr=False)
fewer = H * (C + 4 * Pv)
ported_alone = Weights(
    {name: x[:fewer] if x.shape[0] == features else x for name, x in ported.arrays.items() if "2d" not in name}, alone
)
# Haiku
a_alone = jax.nn.softmax(math.sqrt(1 / 2) * (scalar_term + point_term), axis=-1)
out_alone = ipa_jax.transform_ipa(alone).apply(ported_alone.to_haiku(), s_jax, None, rigids)
# PyTorch
module_alone = ipa_torch.InvariantPointAttention(alone)
module_alone.load_state_dict(ported_alone.to_torch())
out_alone_, a_alone_ = module_alone(s_torch, None, rigids_, return_attention=True)

same("a", a_alone, a_alone_, "H N N")
same("out", out_alone, out_alone_, "N c_s")
print(f"{fewer} features instead of {features}")

# %% [markdown]
# ## Why these constants?
#
# A softmax learns best when its logits start with a variance of about 1. With much more, it looks at one residue only
# and its gradient vanishes; with much less, it looks at all residues alike. So assume that all queries and keys, and
# all coordinates of points, are independent numbers of mean 0 and variance 1, and compute the variance of each term.
#
# - $\mathbf q \cdot \mathbf k$ is a sum of $C$ products of variance 1 each: its variance is $C$. Divide by $\sqrt C$.
# - $b$ has variance 1 by its initialisation.
# - $\tfrac12 \|\vec q - \vec k\|^2 = \tfrac12 \|\vec q\|^2 - \vec q \cdot \vec k + \tfrac12 \|\vec k\|^2$ has three
#   parts. The first is the same for all $j$, so the softmax ignores it. The second has variance $3$ (three products).
#   The third has variance $\tfrac14 \cdot 3 \cdot 2 = \tfrac32$ (the square of a normal number has variance 2). Their
#   covariance is zero, so together they have $\tfrac92$ per point. For $P$ points that is $9P/2$. Multiply by $w_C =
#   \sqrt{2 / 9P}$.
# - The sum of three independent terms of variance 1 has variance 3. Multiply by $w_L = \sqrt{1/3}$; with two terms,
#   $\sqrt{1/2}$.
#
# Random draws agree:

# %%
draws = 200_000
sampled_q, sampled_k = rng.standard_normal((2, draws, C), dtype=np.float32)
sampled_scalar = (sampled_q * sampled_k).sum(-1) / math.sqrt(C)
sampled_q, sampled_k = rng.standard_normal((2, draws, P, 3), dtype=np.float32)
seen_by_softmax = 0.5 * ((sampled_q - sampled_k) ** 2).sum((-1, -2)) - 0.5 * (sampled_q**2).sum((-1, -2))
sampled_point = -w_C * seen_by_softmax
sampled_z, sampled_weights = rng.standard_normal((2, draws, c_z), dtype=np.float32)
sampled_pair = (sampled_z * sampled_weights / math.sqrt(c_z)).sum(-1)
sampled_logit = w_L * (sampled_scalar + sampled_pair + sampled_point)
terms = {"scalars": sampled_scalar, "pair": sampled_pair, "points": sampled_point, "whole logit": sampled_logit}
for name, x in terms.items():
    print(f"variance of {name:11}: {x.var():.2f}")
    assert abs(x.var() - 1) < 0.03

# %% [markdown]
# **And why does γ start at $\log(e - 1)$?** Then $\mathrm{softplus}(\gamma) = 1$, as assumed above:
# $\log(1 + e^{\log(e - 1)}) = \log e = 1$. With $\log(e + 1)$, an easy mistake, the point term would start about half
# as large again as the other terms. The attention would begin more local than intended, because the point term is the
# only one that reaches far below zero.

# %%
for label, x in (("log(e − 1)", math.log(math.e - 1)), ("log(e + 1)", math.log(math.e + 1))):
    softplus = math.log1p(math.exp(x))
    variance = softplus**2 * sampled_point.var()
    print(f"γ = {label} = {x:.4f}: softplus(γ) = {softplus:.4f}, variance of the point term {variance:.2f}")
assert abs(math.log1p(math.exp(math.log(math.e - 1))) - 1) < 1e-12
assert abs(config.point_weight_init - math.log(math.e - 1)) < 1e-12

# %% [markdown]
# ## What each term sees
#
# The pictures show the attention from each term alone and from all three together: one head in the upper row, the mean
# of the twelve heads in the lower row. Nothing is trained, so they show what the architecture itself does before any
# learning.
#
# - *Scalars* depend on the kinds of amino acid: all residues of one kind give and get the same attention, wherever they
#   are. This makes stripes. Averaged over untrained heads they almost vanish.
# - *The pair* depends, here, only on the distance along the chain: each diagonal has one value, and so have all
#   distances beyond 32.
# - *Points* depend on positions in space: compare with the distances of Cα atoms on the left. Residues far apart in the
#   chain but close in the fold show up away from the diagonal.

# %%
head = 3
distance = 10 * np.linalg.norm(t[:, None] - t[None], axis=-1)
maps = {
    "scalars alone": jax.nn.softmax(w_L * scalar_term),
    "pair alone": jax.nn.softmax(w_L * pair_term),
    "points alone": jax.nn.softmax(w_L * point_term),
    "all three (line 7)": a,
}
figure, rows = plt.subplots(2, 5, figsize=(13, 5))
for row, which, pick in ((0, "one head", lambda x: x[head]), (1, "mean of heads", lambda x: x.mean(0))):
    for axis, (title, attention) in zip(rows[row, 1:], maps.items(), strict=True):
        image = axis.imshow(N * pick(np.asarray(attention)), cmap="magma", vmin=0, vmax=5, interpolation="nearest")
        axis.set(xticks=[], yticks=[], title=(title, "")[row], xlabel=("", "key j")[row])
    rows[row, 1].set_ylabel(f"{which}: query i")
figure.colorbar(image, ax=rows[:, 1:], shrink=0.6, label="attention × N (1 is uniform)", extend="max")
image = rows[0, 0].imshow(distance, cmap="viridis_r")
rows[0, 0].set(title="distance of Cα atoms", ylabel="residue i", xlabel="residue j")
rows[1, 0].axis("off")
figure.colorbar(image, cax=rows[1, 0].inset_axes([0, 0.9, 1, 0.06]), orientation="horizontal", label="Å")
plt.show()

# %% [markdown]
# ## Points, in the frame of each residue and in the protein's
#
# A residue's points depend on its single representation, here on its kind alone. So all residues of one kind have the
# four query points of a head at the same four places in their own frames (left). In the protein's frame (right) the
# points lie along the chain, placed and turned by each residue's frame. Line 7 computes distances between these
# points.


# %%
def box(axis, title, centre, half):
    axis.set(title=title, **{f"{x}lim": (c - half, c + half) for x, c in zip("xyz", centre, strict=True)})
    axis.locator_params(nbins=5)
    axis.set_box_aspect((1, 1, 1), zoom=1.1)


def draw_frame(axis, rotation, origin, length):
    for direction in rotation.T:
        axis.plot(*np.stack([origin, origin + length * direction], -1), color=INK, linewidth=1)


kind = np.bincount(aatype).argmax()
(where,) = np.nonzero(aatype == kind)
where = where[:12]
figure = plt.figure(figsize=(10, 4.8))
left, right = (figure.add_subplot(1, 2, i, projection="3d") for i in (1, 2))
draw_frame(left, np.eye(3), np.zeros(3), 8)
right.plot(*(10 * t).T, color=GREY, linewidth=2)
for i in where:
    draw_frame(right, R[i], 10 * t[i], 4)
for p, colour in enumerate((BLUE, ORANGE, GREEN, "#8e5aa8")):
    for axis, points_of_head, origins in ((left, q_local, 0 * t), (right, q_points, t)):
        ends = 10 * np.asarray(points_of_head[where, head, p])
        for end, origin in zip(ends, 10 * origins[where], strict=True):
            axis.plot(*np.stack([origin, end], -1), color=colour, linewidth=0.8, alpha=0.7)
        axis.scatter(*ends.T, s=28, color=colour, label=f"query point {p + 1}")
box(left, f"{len(where)} residues of one kind, each in its own frame (Å)", np.zeros(3), 14)
box(right, "the same in the protein's frame (Å)", np.zeros(3), 28)
left.legend(loc="upper left", bbox_to_anchor=(-0.15, 1), frameon=False)
plt.show()

# %% [markdown]
# ## Invariance
#
# Rotate the protein at random and move it by 30 Å: $R_i \to G R_i$, $\vec t_i \to G \vec t_i + \vec s$. Everything in
# the protein's frame changes. Distances, and everything in a residue's own frame, stay the same.

# %%
G = random_rotations(rng).astype(np.float32)
shift = np.array([3, 0, 0], np.float32)
moved = ipa_jax.Rigid(jnp.asarray(G @ R), jnp.asarray(t @ G.T + shift))
out_moved, a_moved = ipa.apply(params, s_jax, z_jax, moved, return_attention=True)
q_moved = jnp.einsum("iab,ihpb->ihpa", moved.rotation, q_local) + moved.translation[:, None, None]
v_moved = jnp.einsum("iab,ihpb->ihpa", moved.rotation, v_local) + moved.translation[:, None, None]
o_global_moved = jnp.einsum("hij,jhpx->ihpx", a_moved, v_moved)
back = jnp.einsum("iba,ihpb->ihpa", moved.rotation, o_global_moved - moved.translation[:, None, None])


def change(before, after) -> float:
    before, after = np.asarray(before), np.asarray(after)
    return float(np.abs(after - before).max() / np.abs(before).max())


changes = {
    "T∘q⃗, query points": change(q_points, q_moved),
    "Σ a T∘v⃗, before line 10's T⁻¹": change(o_global, o_global_moved),
    "a, attention": change(a, a_moved),
    "o⃗, in residue i's frame": change(o_points, back),
    "out": change(out, out_moved),
}
for name, x in changes.items():
    print(f"{name:36} changes by {x:.0e}" if x > 1e-3 else f"{name:36} is the same but for rounding")
assert [x > 0.1 for x in changes.values()] == [True, True, False, False, False]
assert changes["a, attention"] < bound("attention", "float32") * epsilon
assert changes["out"] < bound("out", "float32") * epsilon

# %%
figure = plt.figure(figsize=(12, 3.8))
for i, (positions, title) in enumerate(((t, "before"), (np.asarray(moved.translation), "turned and moved"))):
    axis = figure.add_subplot(1, 3, i + 1, projection="3d")
    axis.plot(*(10 * positions).T, color=GREY, linewidth=1)
    axis.scatter(*(10 * positions).T, c=np.arange(N), cmap="viridis", s=12)
    box(axis, f"{title} (Å)", (15, 0, 0), 35)
axis = figure.add_subplot(1, 3, 3)
names = list(changes)[::-1]
axis.barh(names, [changes[x] for x in names], color=[ORANGE if changes[x] > 1e-3 else BLUE for x in names])
axis.axvline(epsilon, color=INK, linewidth=1, linestyle=":")
axis.annotate("epsilon of float32", (epsilon, -0.75), xytext=(3, 0), textcoords="offset points", fontsize=8)
axis.set_ylim(-0.9, len(names) - 0.5)
axis.set(xscale="log", xlim=(1e-8, 10), title="largest change, relative")
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## What the mask does
#
# Short chains are padded in batches, and structures have residues without coordinates. A mask, 1 where a residue is
# valid, keeps valid residues from looking at the others: AlphaFold adds $-10^5 (1 - m_i m_j)$ to the logits. Here the
# last fifth of the residues is masked.
#
# - Valid queries (above the line) give masked keys no attention at all, and share it among the valid ones.
# - For a masked query *all* logits are shifted alike, which the softmax ignores: it looks at everything. Do not use its
#   output.
# - The contents of masked residues do not affect valid ones: the right picture replaces them by noise.

# %%
valid = np.arange(N) < N - N // 5
_, a_masked = ipa.apply(params, s_jax, z_jax, rigids, jnp.asarray(valid), return_attention=True)
_, a_masked_ = module(s_torch, z_torch, rigids_, torch.from_numpy(valid), return_attention=True)
same("a", a_masked, a_masked_, "H N N")
noisy = np.where(valid[:, None], s, rng.standard_normal(s.shape, dtype=np.float32))
both = [ipa.apply(params, jnp.asarray(x), z_jax, rigids, jnp.asarray(valid)) for x in (s, noisy)]
assert change(both[0][valid], both[1][valid]) < bound("out", "float32") * epsilon
assert change(both[0][~valid], both[1][~valid]) > 0.1
assert not np.asarray(a_masked)[:, valid][:, :, ~valid].any()

figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), width_ratios=(1, 1, 0.8))
for axis, (title, attention) in zip(axes, (("without a mask", a), ("the last fifth masked", a_masked)), strict=False):
    image = axis.imshow(N * np.asarray(attention).mean(0), cmap="magma", vmin=0, vmax=5)
    axis.set(title=title, xlabel="residue j (key)", ylabel="residue i (query)")
axes[1].axhline(valid.sum() - 0.5, color="white", linewidth=1)
axes[1].axvline(valid.sum() - 0.5, color="white", linewidth=1)
figure.colorbar(image, ax=axes[1], shrink=0.8, label="attention × N", extend="max")
difference = np.abs(np.asarray(both[0]) - np.asarray(both[1])).max(-1)
axes[2].plot(difference, color=BLUE, marker=".", linewidth=0.8)
axes[2].axvline(valid.sum() - 0.5, color=INK, linewidth=1, linestyle=":")
axes[2].set(title="change of the output when\nmasked residues become noise", xlabel="residue i")
axes[2].spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Where to go from here
#
# - The whole attention in one call: `ipa_jax.transform_ipa(config)` and `ipa_torch.InvariantPointAttention(config)`.
#   The [README](../README.md) has a quickstart for each, and shows how to load AlphaFold's published parameters.
# - The same lines in the packages: [`ipa_jax/attention/reference.py`](../ipa_jax/attention/reference.py),
#   [`ipa_torch/attention/reference.py`](../ipa_torch/attention/reference.py), and in float64 numpy
#   [`ipa_bridge/oracle.py`](../ipa_bridge/oracle.py). `streamed.py` next to them needs only
#   memory linear in $N$ beside the pair.
# - The structure module that AlphaFold builds around it: `ipa_jax.transform_structure_module`,
#   `ipa_torch.StructureModule`.
# - A model that is trained with it: [`examples/denoise_backbone.py`](../examples/denoise_backbone.py).
