"""Groups of heads to sweep over, as masks by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from engine.core.reading import check_model, read_heads
from models import Model
from models.reading import read_tensor
from models.shapes import Bool, Integer

Groups: TypeAlias = Mapping[str, Tensor | np.ndarray] | Literal["heads", "layers"]


def layers(model: Model) -> dict[str, Bool[Tensor, "layers heads"]]:
    """All heads of a layer, for every layer.

    >>> list(engine.groups.layers(model))[:2]
    ['layer 0', 'layer 1']
    """
    check_model(model)
    shape = model.shape
    masks = torch.eye(shape.n_layers, dtype=torch.bool)[:, :, None].expand(-1, -1, shape.n_heads)
    return {f"layer {layer}": mask for layer, mask in enumerate(masks)}


def pairs(model: Model, heads: Sequence[Sequence[Integer]]) -> dict[str, Bool[Tensor, "layers heads"]]:
    """Every two of these heads.

    >>> list(engine.groups.pairs(model, [(1, 0), (2, 0), (2, 1)]))
    ['1.0 + 2.0', '1.0 + 2.1', '2.0 + 2.1']
    """
    return {" + ".join(f"{la}.{h}" for la, h in two): _mask(model, two) for two in combinations(heads, 2)}


def cumulative(model: Model, heads: Sequence[Sequence[Integer]]) -> dict[str, Bool[Tensor, "layers heads"]]:
    """The first of these heads, the first two, and so on: of a ranking, the top k for every k.

    >>> [int(mask.sum()) for mask in engine.groups.cumulative(model, [(2, 0), (1, 0)]).values()]
    [1, 2]
    """
    return {f"top {k}": _mask(model, heads[:k]) for k in range(1, len(heads) + 1)}


def _mask(model: Model, heads: Sequence[Sequence[Integer]]) -> Bool[Tensor, "layers heads"]:
    """Raises IndexError or TypeError for what is no head of the model."""
    check_model(model)
    return read_heads(model.shape, list(heads))[0]


def read_groups(model: Model, groups: Groups) -> tuple[Bool[Tensor, "units layers heads"], list[str] | None]:
    """The masks, in order, and their names; single heads have none."""
    shape = (model.shape.n_layers, model.shape.n_heads)
    if isinstance(groups, str) and groups == "heads":
        return torch.eye(shape[0] * shape[1], dtype=torch.bool).unflatten(1, shape), None
    if isinstance(groups, str) and groups == "layers":
        groups = layers(model)
    if not isinstance(groups, Mapping):
        raise ValueError(f"groups must be 'heads', 'layers' or masks by name, got {groups!r:.80}")
    masks = {name: read_tensor(mask, f"group {name!r}") for name, mask in groups.items()}
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise ValueError(f"group {name!r} must be a bool mask {list(shape)}, got {mask!r:.80}")
    if not groups:
        raise ValueError("no groups were given")
    return torch.stack(list(masks.values())).cpu(), list(masks)
