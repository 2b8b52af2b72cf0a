"""What is patched together in a sweep: single units of a site, or groups of them, as masks by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from engine.core.reading import check_model, read_heads, read_site
from models import Model, Site, SiteShape
from models.reading import read_tensor
from models.shapes import Bool, Integer

Named: TypeAlias = Literal["units", "heads", "layers"]
Groups: TypeAlias = Mapping[str, Tensor | np.ndarray] | Named
OF_HEADS: tuple[Site, ...] = ("z", "q", "k", "v", "pattern")


def layers(model: Model, site: Site = "z") -> dict[str, Bool[Tensor, "layers units"]]:
    """All heads of a layer (all units of another site), for every layer.

    >>> list(engine.groups.layers(model))[:2]
    ['layer 0', 'layer 1']
    """
    check_model(model)
    size = read_site(model, site)
    every = existing(size)
    return {f"layer {layer}": mask & every for layer, mask in enumerate(torch.eye(size.n_layers).bool()[:, :, None])}


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


def existing(size: SiteShape) -> Bool[Tensor, "layers units"]:
    """The units that each layer has."""
    mask = torch.ones(size.n_layers, size.units, dtype=torch.bool)
    for layer, (here, _) in enumerate(size.sizes):
        mask[layer, here:] = False
    return mask


@dataclass(frozen=True, eq=False)
class Units:
    """What is patched in each of U rows: a group of a site's units, or one after the other, by layers.

    masks: of groups, with their names; None: single units. Of those that a layer has not, the row is unpatched.
    """

    size: SiteShape
    masks: Bool[Tensor, "groups layers units"] | None = None
    names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return self.size.n_layers * self.size.units if self.masks is None else len(self.masks)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result: [layers, units]; [layers] where there is one a layer; [groups]."""
        if self.masks is not None:
            return (len(self.masks),)
        return (self.size.n_layers,) + ((self.size.units,) if self.size.units > 1 else ())

    def rows(self, start: int, stop: int) -> Bool[Tensor, "rows layers units"]:
        if self.masks is not None:
            return self.masks[start:stop]
        found = torch.zeros(stop - start, self.size.n_layers * self.size.units, dtype=torch.bool)
        found[range(stop - start), range(start, stop)] = True
        return found.unflatten(1, (self.size.n_layers, self.size.units)) & existing(self.size)

    @property
    def nbytes(self) -> int:
        """Of the mask of a row."""
        return self.size.n_layers * self.size.units


def read_groups(model: Model, groups: Groups, site: Site = "z") -> Units:
    """Raises ValueError for what is no group of units of the site."""
    size = read_site(model, site)
    shape = (size.n_layers, size.units)
    if isinstance(groups, str) and groups in get_args(Named):
        if groups == "heads" and site not in OF_HEADS:
            raise ValueError(f"groups='heads' are of {', '.join(OF_HEADS)}, got site {site!r}: 'units' are its own")
        if groups != "layers":
            return Units(size)
        groups = layers(model, site)
    if not isinstance(groups, Mapping):
        raise ValueError(f"groups must be 'units', 'heads', 'layers' or masks by name, got {groups!r:.80}")
    masks = {name: read_tensor(mask, f"group {name!r}") for name, mask in groups.items()}
    for name, mask in masks.items():
        if isinstance(mask, Tensor) and mask.dtype == torch.bool and tuple(mask.shape) == shape[:1] and shape[1] == 1:
            masks[name] = mask = mask[:, None]
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise ValueError(f"group {name!r} must be a bool mask {list(shape)}, got {mask!r:.80}")
        if (mask.cpu() & ~existing(size)).any():
            raise ValueError(f"group {name!r} holds units that a layer has not")
    if not groups:
        raise ValueError("no groups were given")
    return Units(size, torch.stack(list(masks.values())).cpu(), tuple(masks))
