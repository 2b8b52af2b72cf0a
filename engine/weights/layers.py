"""Functions that take weights, for weights of each sample's own: products, embeddings, convolutions.

All see samples apart: x [batch, *], where a forward of one sample would see [*]. What is not here, or is called in a
way that is not (NotImplemented), runs under `torch.vmap`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from engine.weights.kept import Kept
from engine.weights.products import SAMPLES, Way, product
from engine.weights.reading import Composition
from engine.weights.recomputing import again
from models.shapes import Float, Int


@runtime_checkable
class Read(Protocol):
    """One function of a kept parameter, on its way."""

    composition: Composition
    way: Way

    def samples(self, operand: Any) -> Tensor:
        """Of an operand, kept or not: [batch, *], what each sample has of it."""
        ...


def linear(read: Read, input: Any, weight: Any, bias: Any = None) -> Any:
    return _multiply(read, input, weight, bias, rows_in=False)


def addmm(read: Read, input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """The `Conv1D` of transformers."""
    return _multiply(read, mat1, mat2, input, rows_in=True) if (beta, alpha) == (1, 1) else NotImplemented


def matmul(read: Read, input: Any, other: Any) -> Any:
    return _multiply(read, input, other, None, rows_in=True)


def _multiply(read: Read, x: Any, weight: Any, bias: Any, rows_in: bool) -> Any:
    """[batch, *places, out]"""
    if not _whole(weight) or weight.ndim != 2 or x.dtype != weight.dtype or (bias is not None and bias.ndim != 1):
        return NotImplemented
    each, made = read.samples(x), read.composition
    delta = made.vectors.factors.get(weight.parameter) or made.vectors.tensors[weight.parameter]
    flat = each.reshape(len(each), -1, each.shape[-1])
    c = made.of(weight.parameter)
    y = product(flat, made.base[weight.parameter], delta, c, rows_in != weight.turned, read.way)
    if bias is not None:
        y += read.samples(bias)[:, None]
    return y.view(*each.shape[:-1], y.shape[-1])


def embedding(
    read: Read,
    input: Int[Tensor, "*places"],
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """[batch, *places, width]: rows of the table, and of its vectors; no table is merged."""
    if not _whole(weight) or weight.turned or max_norm is not None:
        return NotImplemented
    each, made, name = read.samples(input), read.composition, weight.parameter
    c, y = made.of(name), made.base[name][each]
    for t in range(len(made.vectors)):
        share = c[:, t].view(-1, *(1 for _ in y.shape[1:]))
        if name in made.vectors.factors:
            left, right = made.vectors.factors[name]
            y = y + share * (left[t][each] @ right[t])
        else:
            y = torch.addcmul(y, share, made.vectors.tensors[name][t][each])
    return y


def layer_norm(
    read: Read, input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    """[batch, *places, *shape]"""
    if not (isinstance(weight, Kept) and isinstance(bias, Kept)):
        return NotImplemented
    normed = F.layer_norm(read.samples(input), normalized_shape, None, None, eps)
    w, b = (
        read.samples(p).view(len(normed), *(1 for _ in normed.shape[1 + p.ndim :]), *p.shape) for p in (weight, bias)
    )
    graph = torch.is_grad_enabled() and (normed.requires_grad or w.requires_grad)
    return torch.addcmul(b, normed, w) if graph else torch.addcmul(b, normed, w, out=normed)


def conv(
    function: Callable[..., Tensor],
    read: Read,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """[batch, rows, out, *space]: samples as groups of channels; where patches do not overlap, one product."""
    if not _whole(weight) or input.ndim != weight.ndim or input.dtype != weight.dtype:
        return NotImplemented
    each, made, name = read.samples(input), read.composition, weight.parameter
    size = tuple(weight.shape[2:])
    if _all(stride, size) == size and _all(padding, size) == (0,) * len(size) == _none(dilation, size) and groups == 1:
        patches = _patches(each, size)
        tau = made.vectors.tensors[name].flatten(2)
        y = product(patches.flatten(1, -2), made.base[name].flatten(1), tau, made.of(name), False, _whole_way(read.way))
        y = y.view(*patches.shape[:-1], -1).movedim(-1, 2)
    else:
        y = _grouped(function, each, made, name, stride, padding, dilation, groups)
    if bias is None:
        return y
    of_samples = read.samples(bias)
    return y + of_samples.view(len(of_samples), 1, -1, *(1 for _ in size))


def _patches(x: Float[Tensor, "batch rows channels *space"], size: tuple[int, ...]) -> Tensor:
    """[batch, rows, *patches, channels * size]; what is left at the edges is cut off."""
    for axis, width in enumerate(size, start=3):
        n = x.shape[axis] // width
        x = x.narrow(axis, 0, n * width).unfold(axis, width, width)
    return x.movedim(2, 2 + len(size)).flatten(2 + len(size))


def _grouped(
    function: Callable[..., Tensor], x: Tensor, made: Composition, name: str, stride: Any, padding: Any, dilation: Any,
    groups: int,
) -> Tensor:  # fmt: skip
    c, base, tau = made.of(name), made.base[name], made.vectors.tensors[name]

    def some(x: Tensor, c: Tensor) -> Tensor:
        merged = base + torch.tensordot(c, tau, dims=1)  # [some, out, in, *size]
        side = x.transpose(0, 1).flatten(1, 2)  # [rows, some * channels, *space]
        y = function(side, merged.flatten(0, 1), None, stride, padding, dilation, groups * len(c))
        return y.unflatten(1, (len(c), -1)).transpose(0, 1)

    parts = zip(x.split(SAMPLES), c.split(SAMPLES), strict=True)
    if torch.is_grad_enabled() and (x.requires_grad or c.requires_grad):  # nothing merged is kept
        return torch.cat([again(some, *part) for part in parts])
    return torch.cat([some(*part) for part in parts])


def _all(given: Any, size: tuple[int, ...]) -> tuple[Any, ...]:
    found = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    return found * len(size) if len(found) == 1 else found


def _none(dilation: Any, size: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(d - 1 for d in _all(dilation, size))


def _whole_way(way: Way) -> Way:
    return "auto" if way == "low_rank" else way


def _whole(weight: Any) -> bool:
    return isinstance(weight, Kept) and weight.whole


# What torch is asked for, to what is done instead: function(read, *args, **kwargs), by torch's names of them.
LAYERS: dict[Any, Callable[..., Any]] = {
    F.linear: linear,
    torch.addmm: addmm,
    torch.matmul: matmul,
    Tensor.matmul: matmul,
    F.embedding: embedding,
    F.layer_norm: layer_norm,
    torch.conv1d: partial(conv, torch.conv1d),
    torch.conv2d: partial(conv, torch.conv2d),
    torch.conv3d: partial(conv, torch.conv3d),
}
NAMES = {function: frozenset(signature(form).parameters) for function, form in LAYERS.items()}
