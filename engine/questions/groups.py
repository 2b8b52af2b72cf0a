"""Groups of heads to sweep over, as masks by name."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from engine.core.patches import check_model, read_heads
from models import Model
from models.shapes import Bool, Integer


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
