"""A patch as data: which heads, at which positions, output what instead. Checked in full before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from models import Shape
from models.shapes import Bool, Float

Mode: TypeAlias = Literal["replace", "add"]
# A mask [rows, layers, heads] or [layers, heads], or (layer, head) pairs for one row; None patches nothing.
Heads: TypeAlias = "Bool[Tensor, 'rows layers heads'] | Bool[Tensor, 'layers heads'] | Sequence[tuple[int, int]] | None"


@dataclass(frozen=True)
class Patch:
    """rows of a prompt, each with its own heads patched.

    heads:     mask; one row each.
    values:    what the heads output, shared by all rows or one set a row.
    positions: tokens patched, negative ones counted from the end of the prompt.
    mode:      "replace" the heads' output by the values, or "add" the values to it.
    """

    heads: Bool[Tensor, "rows layers heads"]
    values: Float[Tensor, "layers heads head_dim"] | Float[Tensor, "rows layers heads head_dim"]
    positions: tuple[int, ...]
    mode: Mode

    @property
    def n_rows(self) -> int:
        return len(self.heads)

    def rows(self, start: int, stop: int) -> Patch:
        """Some of the rows."""
        values = self.values if self.values.ndim == 3 else self.values[start:stop]
        return Patch(self.heads[start:stop], values, self.positions, self.mode)

    def at(self, n_tokens: int) -> tuple[int, ...]:
        """The patched positions of a prompt of `n_tokens`, from its start, in order.

        Raises IndexError if one lies outside the prompt.
        """
        outside = [p for p in self.positions if not -n_tokens <= p < n_tokens]
        if outside:
            raise IndexError(f"position {outside[0]} lies outside the prompt, which has {n_tokens} tokens")
        return tuple(sorted({p % n_tokens for p in self.positions}))


def read_patch(
    shape: Shape,
    heads: Heads,
    values: Tensor | None,
    positions: int | Sequence[int] = -1,
    mode: Mode = "replace",
) -> Patch:
    """Check what a caller gave against the model's shape.

    Raises TypeError, ValueError or IndexError naming what was given and what was expected.
    """
    mask = read_heads(shape, heads)
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}")
    return Patch(mask, read_values(shape, values, mask), read_positions(positions), mode)


def read_positions(positions: int | Sequence[int]) -> tuple[int, ...]:
    at = (positions,) if isinstance(positions, int) else tuple(positions) if isinstance(positions, Sequence) else ()
    if not at or not all(isinstance(p, int) and not isinstance(p, bool) for p in at):
        raise TypeError(f"positions must be an int or a list of ints, got {positions!r}")
    return at


def read_heads(shape: Shape, heads: Heads) -> Bool[Tensor, "rows layers heads"]:
    n_layers, n_heads = shape.n_layers, shape.n_heads
    if heads is None:
        return torch.zeros(1, n_layers, n_heads, dtype=torch.bool)
    if not isinstance(heads, Tensor):
        if not isinstance(heads, Iterable):
            raise TypeError(f"heads must be a bool mask or a list of (layer, head), got {heads!r}")
        return _mask_of_pairs(shape, list(heads))[None]
    if heads.dtype != torch.bool:
        raise TypeError(f"heads must be a bool mask or a list of (layer, head), got a tensor of {heads.dtype}")
    mask = heads[None] if heads.ndim == 2 else heads
    if mask.ndim != 3 or mask.shape[1:] != (n_layers, n_heads) or not len(mask):
        raise ValueError(
            f"heads must have shape [rows, {n_layers}, {n_heads}] or [{n_layers}, {n_heads}], got {list(heads.shape)}"
        )
    return mask


def _mask_of_pairs(shape: Shape, pairs: list[Any]) -> Bool[Tensor, "layers heads"]:
    mask = torch.zeros(shape.n_layers, shape.n_heads, dtype=torch.bool)
    for pair in pairs:
        try:
            layer, head = (index(i) for i in pair)
        except (TypeError, ValueError):
            raise TypeError(f"heads must be a bool mask or a list of (layer, head), got {pair!r} in the list") from None
        if not 0 <= layer < shape.n_layers:
            raise IndexError(
                f"layer {layer} of head {(layer, head)} is out of range: layers are 0..{shape.n_layers - 1}"
            )
        if not 0 <= head < shape.n_heads:
            raise IndexError(f"head {head} of head {(layer, head)} is out of range: heads are 0..{shape.n_heads - 1}")
        mask[layer, head] = True
    return mask


def read_values(shape: Shape, values: Tensor | None, mask: Bool[Tensor, "rows layers heads"]) -> Tensor:
    one = (shape.n_layers, shape.n_heads, shape.head_dim)
    if values is None:
        if mask.any():
            raise ValueError(f"heads are to be patched but no values were given: expected a tensor {list(one)}")
        return torch.zeros(one)
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"values must be a floating-point tensor, got {kind}")
    if tuple(values.shape) not in (one, (len(mask), *one)):
        raise ValueError(
            f"values must have shape {list(one)}, or {[len(mask), *one]} for one set a row, got {list(values.shape)}"
        )
    if not values.isfinite().all():
        layer, head = (int(i) for i in (~values.isfinite()).nonzero()[0][-3:-1])
        raise ValueError(f"values must be finite, got NaN or inf (first at layer {layer}, head {head})")
    return values
