"""Products with weights of each sample's own, y_b = x_b (W + sum_t c[b, t] tau_t), by three ways, and their costs.

Matrices are [rows, columns], x [batch, tokens, in]: rows are outputs (`Linear`: y = x M^T) unless `rows_in` says that
they are inputs (transformers' `Conv1D`: y = x M).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from engine.weights.vectors import Factors
from models.linear import multiplies, onednn
from models.shapes import Float

Way: TypeAlias = Literal["auto", "merge", "wide", "low_rank"]
# Samples merged at once, and numbers of a merged tile of each: together they and their task vectors stay in the cache.
SAMPLES, TILE = 16, 3 * 2**16
# Merging one number costs as much as so many multiplications in a product of its own, and a product with a matrix that
# was just merged at least as much as with so many tokens: measured.
MERGING, LEAST = 5, 16
# Tokens and rows of a tile, from which on x M^T in its place is faster than M x^T and a copy: measured.
TOKENS, ROWS = 32, 200


def product(
    x: Float[Tensor, "batch tokens in"],
    weight: Float[Tensor, "rows columns"],
    delta: Tensor | Factors,
    c: Float[Tensor, "batch vectors"],
    rows_in: bool = False,
    way: Way = "auto",
) -> Float[Tensor, "batch tokens out"]:
    """delta: [vectors, rows, columns], or its factors of low rank."""
    if way == "auto" or way == ("wide" if isinstance(delta, tuple) else "low_rank"):
        way = cheapest(x.shape[1], delta, c.shape[1])
    if way == "low_rank" and isinstance(delta, tuple):
        return low_rank(x, weight, delta, c, rows_in)
    if way == "wide" and isinstance(delta, Tensor):
        return wide(x, weight, delta, c, rows_in)
    left, right = delta if isinstance(delta, tuple) else (delta, None)
    if torch.is_grad_enabled() and (x.requires_grad or c.requires_grad):
        return Merged.apply(x, weight, left, right, c, rows_in)
    return merge(x, weight, delta, c, rows_in)


def cheapest(tokens: int, delta: Tensor | Factors, vectors: int) -> Way:
    """By multiplications for each number of the matrix and sample."""
    merging = MERGING * vectors + max(tokens, LEAST)
    if isinstance(delta, Tensor):
        return "wide" if tokens * (1 + vectors) < merging else "merge"
    left, right = delta
    rank, rows, columns = left.shape[2], left.shape[1], right.shape[2]
    return "low_rank" if tokens * (1 + vectors * rank * (1 / rows + 1 / columns)) < merging * rank else "merge"


def wide(
    x: Float[Tensor, "batch tokens in"],
    weight: Float[Tensor, "rows columns"],
    delta: Float[Tensor, "vectors rows columns"],
    c: Float[Tensor, "batch vectors"],
    rows_in: bool,
) -> Float[Tensor, "batch tokens out"]:
    """[x, c_1 x, ..., c_T x] times [W, tau_1, ..., tau_T] below each other, part by part."""
    flat = x.flatten(0, 1)
    y = flat @ (weight if rows_in else weight.mT)
    for t, tau in enumerate(delta):
        y.addmm_((c[:, t, None, None] * x).flatten(0, 1), tau if rows_in else tau.mT)
    return y.view(*x.shape[:2], -1)


def low_rank(
    x: Float[Tensor, "batch tokens in"],
    weight: Float[Tensor, "rows columns"],
    delta: Factors,
    c: Float[Tensor, "batch vectors"],
    rows_in: bool,
) -> Float[Tensor, "batch tokens out"]:
    """Gives x W + sum_t c_t (x A_t) B_t."""
    left, right = delta
    down, up = (left, right) if rows_in else (right.mT, left.mT)  # [T, in, rank], [T, rank, out]
    n_vectors, _, rank = down.shape
    flat = x.flatten(0, 1)
    narrow = flat @ down.transpose(0, 1).flatten(1)  # [batch * tokens, T * rank]
    weighed = narrow.view(*x.shape[:2], n_vectors, rank) * c[:, None, :, None]
    y = torch.addmm(flat @ (weight if rows_in else weight.mT), weighed.flatten(2).flatten(0, 1), up.flatten(0, 1))
    return y.view(*x.shape[:2], -1)


def merge(
    x: Float[Tensor, "batch tokens in"],
    weight: Float[Tensor, "rows columns"],
    delta: Tensor | Factors,
    c: Float[Tensor, "batch vectors"],
    rows_in: bool,
) -> Float[Tensor, "batch tokens out"]:
    """Tile by tile: a few rows of the matrix, merged for a few samples, in a buffer that is used again."""
    width = weight.shape[1] if rows_in else weight.shape[0]
    y = x.new_zeros(*x.shape[:2], width) if rows_in else x.new_empty(*x.shape[:2], width)
    long = x.shape[1] >= TOKENS
    for rows, some, tile in tiles(weight, delta, c):
        if rows_in:
            y[some].baddbmm_(x[some, :, rows], tile)
        elif long and multiplies(x, tile):  # MKL's batched product is at half the rate of it on AMD
            for ours, merged, out in zip(x[some], tile, y[some, :, rows], strict=True):
                out.copy_(onednn(ours, merged))
        elif long and tile.shape[1] >= ROWS:
            torch.bmm(x[some], tile.mT, out=y[some, :, rows])
        else:
            y[some, :, rows] = torch.bmm(tile, x[some].mT).mT
    return y


def tiles(
    weight: Float[Tensor, "rows columns"], delta: Tensor | Factors, c: Float[Tensor, "batch vectors"]
) -> Iterator[tuple[slice, slice, Float[Tensor, "some rows columns"]]]:
    """Rows of the matrix, samples, and these rows merged for them."""
    n_rows, width = weight.shape
    step, count = min(n_rows, max(1, TILE // width)), min(SAMPLES, len(c))
    buffer, stack = weight.new_empty(count, step * width), weight.new_empty(1 + c.shape[1], step * width)
    weights = torch.cat([torch.ones_like(c[:, :1]), c], dim=1)  # W is one more vector, of weight 1
    for start in range(0, n_rows, step):
        rows = slice(start, min(start + step, n_rows))
        ours = weight[rows]
        below = stack[:, : ours.numel()]
        if isinstance(delta, Tensor):
            below[0], below[1:] = ours.flatten(), delta[:, rows].flatten(1)
        for first in range(0, len(c), SAMPLES):
            some = slice(first, min(first + SAMPLES, len(c)))
            flat = buffer.flatten()[: len(c[some]) * ours.numel()].view(-1, ours.numel())
            tile = flat.view(-1, *ours.shape)
            if isinstance(delta, Tensor):
                torch.mm(weights[some], below, out=flat)
            else:  # W + [c_1 A_1, ..., c_T A_T] [B_1; ...; B_T]
                left, right = delta
                weighed = torch.einsum("nt,trk->nrtk", c[some], left[:, rows]).flatten(2)
                torch.baddbmm(ours.expand_as(tile), weighed, right.flatten(0, 1).expand(len(tile), -1, -1), out=tile)
            yield rows, some, tile


class Merged(Function):
    """`merge` with gradients: nothing merged is kept, the backward pass merges again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, left: Tensor, right: Tensor | None, c: Tensor, rows_in: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, left, right, c)
        ctx.rows_in = rows_in
        return merge(x, weight, left if right is None else (left, right), c, rows_in)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        """dL/dx_b = g_b M_b and dL/dc[b, t] = <tau_t, g_b^T x_b>, tile by tile."""
        x, weight, left, right, c = ctx.saved_tensors
        of_x, _, _, _, of_c, _ = ctx.needs_input_grad
        dx, dc = torch.zeros_like(x) if of_x else None, torch.zeros_like(c) if of_c else None
        for rows, some, tile in tiles(weight, left if right is None else (left, right), c):
            if dx is not None:
                if ctx.rows_in:
                    dx[some, :, rows] = torch.bmm(g[some], tile.mT)
                else:
                    dx[some].baddbmm_(g[some, :, rows], tile)
            if dc is not None:
                outer = (x[some, :, rows], g[some]) if ctx.rows_in else (g[some, :, rows], x[some])
                torch.bmm(outer[0].mT, outer[1], out=tile)  # dL/dM of these rows
                if right is None:
                    dc[some].addmm_(tile.flatten(1), left[:, rows].flatten(1).mT)
                else:
                    dc[some] += torch.einsum("nrw,trk,tkw->nt", tile, left[:, rows], right)
        return dx, None, None, None, dc, None
