"""A patch as data: which heads, at which positions, output what instead. Checked in full before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from models import Model, Shape
from models.reading import as_int, read_int, read_list, read_tensor
from models.shapes import Bool, Float, Integer

Mode: TypeAlias = Literal["replace", "add"]
# A mask [rows, layers, heads] or [layers, heads], or (layer, head) pairs for one row; None patches nothing.
Heads: TypeAlias = Tensor | np.ndarray | Sequence[Iterable[Integer]] | None
# [layers, heads, head_dim], or one set a row.
Values: TypeAlias = Tensor | np.ndarray | None
Positions: TypeAlias = Integer | Sequence[Integer]  # arrays and tensors are of the first type


@dataclass(frozen=True)
class Steering:
    """A vector added to the residual stream after a layer, at the patched tokens.

    vector: what is added.
    layers: after which layer, for all rows; or a list of them, one row each, None for a row that nothing is added to.

    >>> logits = engine.patch(model, "Q: hot\\nA:", steering=engine.Steering(torch.zeros(model.shape.d_model), [0, 1]))
    """

    vector: Float[Tensor, " d_model"] | np.ndarray
    layers: Integer | Sequence[Integer | None]


@dataclass(frozen=True)
class Patch:
    """rows of a prompt, each with its own heads patched.

    heads:     mask; one row each.
    values:    what the heads output, shared by all rows or one set a row.
    positions: tokens patched, negative ones counted from the end of the prompt.
    mode:      "replace" the heads' output by the values, or "add" the values to it.
    steering:  a vector added to the residual stream of the same tokens, `layers` being one a row.
    """

    heads: Bool[Tensor, "rows layers heads"]
    values: Float[Tensor, "layers heads head_dim"] | Float[Tensor, "rows layers heads head_dim"]
    positions: tuple[int, ...]
    mode: Mode
    steering: Steering | None = None

    @property
    def n_rows(self) -> int:
        return len(self.heads)

    def rows(self, start: int, stop: int) -> Patch:
        """Some of the rows."""
        return self.select(range(self.n_rows)[start:stop])

    def select(self, rows: Sequence[int]) -> Patch:
        """These rows, in this order."""
        index = torch.tensor(rows, device=self.heads.device)
        values = self.values if self.values.ndim == 3 else self.values[index.to(self.values.device)]
        steering = self.steering and replace(self.steering, layers=[self.steered_after[row] for row in rows])
        return Patch(self.heads[index], values, self.positions, self.mode, steering)

    @property
    def steered_after(self) -> Sequence[int | None]:
        """The layer after which each row is steered."""
        if self.steering is None:
            return [None] * self.n_rows
        layers = self.steering.layers
        return [layers] * self.n_rows if isinstance(layers, int) else layers  # type: ignore[return-value]

    def first_layers(self) -> list[int]:
        """The first layer at which each row is patched or steered; the last for a row that is neither."""
        layers = self.heads.any(dim=2)  # [R, L]
        last = layers.shape[1] - 1
        first = torch.where(layers.any(dim=1), layers.int().argmax(dim=1), last).tolist()
        return [min(a, last if b is None else b) for a, b in zip(first, self.steered_after, strict=True)]

    def at(self, n_tokens: int) -> tuple[int, ...]:
        """The patched positions of a prompt of `n_tokens`, from its start, in order.

        Raises IndexError if one lies outside the prompt.
        """
        outside = [p for p in self.positions if not -n_tokens <= p < n_tokens]
        if outside:
            raise IndexError(f"position {outside[0]} lies outside the prompt, which has {n_tokens} tokens")
        return tuple(sorted({p % n_tokens for p in self.positions}))


def check_model(model: Any) -> None:
    """Raises TypeError for a model that was not wrapped."""
    if not hasattr(model, "rules"):
        kind = type(model).__name__
        raise TypeError(
            f"expected a model of models.load(...) or models.wrap(...), got {kind}: wrap it, models.wrap(hf)"
        )


def read_patch(
    model: Model,
    heads: Heads,
    values: Values,
    positions: Positions = -1,
    mode: Mode = "replace",
    steering: Steering | None = None,
) -> Patch:
    """Check what a caller gave against the model's shape and dtype.

    Raises TypeError, ValueError or IndexError naming what was given and what was expected.
    """
    check_model(model)
    steering = read_steering(model, steering)
    mask = read_heads(model.shape, heads)
    if steering is not None and isinstance(steering.layers, list):
        mask = mask.repeat(len(steering.layers), 1, 1) if heads is None else mask
        if len(steering.layers) != len(mask):
            raise ValueError(f"steering must name a layer for each of {len(mask)} rows, got {len(steering.layers)}")
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}")
    return Patch(mask, read_values(model, values, mask), read_positions(positions), mode, steering)


def read_steering(model: Model, steering: Steering | None) -> Steering | None:
    """With a tensor, and layers as an int or a list."""
    if steering is None:
        return None
    if not isinstance(steering, Steering):
        raise TypeError(f"steering must be an engine.Steering, got {type(steering).__name__}")
    shape, vector = model.shape, read_tensor(steering.vector, "a steering vector")
    if not isinstance(vector, Tensor) or not vector.is_floating_point() or tuple(vector.shape) != (shape.d_model,):
        given = f"{vector.dtype} {list(vector.shape)}" if isinstance(vector, Tensor) else type(vector).__name__
        raise ValueError(f"a steering vector must be a floating-point tensor {[shape.d_model]}, got {given}")
    if not vector.isfinite().all():
        raise ValueError("the steering vector must be finite, got NaN or inf")
    check_fits(model, vector, "the steering vector")
    if steering.layers is None or not (each := read_list(steering.layers)):
        raise TypeError(f"steering layers must be an int, or a list of one a row, got {steering.layers!r}")
    layers = [None if given is None else as_int(given) for given in each]
    for given, layer in zip(each, layers, strict=True):
        if given is not None and (layer is None or not 0 <= layer < shape.n_layers):
            raise IndexError(f"steering layer {given!r} is out of range: layers are 0..{shape.n_layers - 1}")
    return Steering(vector, layers if as_int(steering.layers) is None else layers[0])  # type: ignore[arg-type]


def read_positions(positions: Positions) -> tuple[int, ...]:
    at = [as_int(position) for position in read_list(positions)]
    if not at or None in at:
        raise TypeError(f"positions must be an int or a list of ints, got {positions!r}")
    return tuple(at)  # type: ignore[arg-type]


def read_heads(shape: Shape, heads: Heads) -> Bool[Tensor, "rows layers heads"]:
    n_layers, n_heads = shape.n_layers, shape.n_heads
    if heads is None:
        return torch.zeros(1, n_layers, n_heads, dtype=torch.bool)
    heads = read_tensor(heads, "heads")
    if isinstance(heads, Tensor) and heads.dtype != torch.bool and heads.shape[1:] == (2,) and n_heads != 2:
        heads = heads.tolist()  # pairs, as `mask.nonzero()` gives them
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
            layer, head = (read_int(i, "a number", None) for i in pair)
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


def read_values(model: Model, values: Values, mask: Bool[Tensor, "rows layers heads"]) -> Tensor:
    shape, values = model.shape, read_tensor(values, "values")
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
    check_fits(model, values, "values")
    return values


def check_fits(model: Model, given: Tensor, what: str) -> None:
    """Raises ValueError for numbers that are finite, but not in the model's dtype."""
    most = torch.finfo(model.dtype).max
    if torch.finfo(given.dtype).max > most and (largest := given.detach().abs().max()).to(model.dtype).isinf():
        raise ValueError(
            f"{what} must be finite in {model.dtype}, the dtype of {model.name}, whose greatest number is {most:.5g}: "
            f"got {largest:.5g}"
        )
