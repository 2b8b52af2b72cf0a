"""Maps of effects: which unit lies at which row and column, under which names, on how many maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from engine import plots
from engine.questions.effects import Effects, Ranking
from engine.questions.statistics import needed
from models.shapes import Int

MARKS = {" ": "·", "\n": "↵", "\t": "→"}
LONGEST = 24  # characters of a name on an axis


@dataclass(frozen=True)
class Maps:
    """units: which of them lies where, counted through. titles: of the maps, none for a single one. rows, columns:
    what each is called. y, x: what rows and columns are.
    """

    units: Int[Tensor, "maps rows columns"]
    titles: Sequence[str]
    rows: Sequence[int | str]
    columns: Sequence[int | str]
    y: str
    x: str


def visible(text: str) -> str:
    """A token's text with its spaces, and whatever else does not print, to be seen: " Paris" is "·Paris"."""
    shown = (MARKS.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)
    return "".join(shown)


def position_names(effects: Effects) -> list[int | str]:
    """The text at each position where it is known, else its name or number."""
    if effects.tokens is not None:
        return [_short(visible(text)) for text in effects.tokens]
    return [_short(p) if isinstance(p, str) else int(p) for p in effects.positions or ()]


def maps_of(effects: Effects) -> Maps:
    """One unit a layer: a single map of positions by layers (one row without positions). Groups: of positions by
    groups. Heads: a map of heads by layers for each position. Neurons, of which there are many: of layers by neurons.

    Raises ValueError for groups without positions.
    """
    shape = effects.patched.shape[1:]
    units = torch.arange(prod(shape)).reshape(shape)
    names = position_names(effects)
    if effects.positions is None:
        units = units[None]
    if effects.groups is not None and effects.positions is None:
        raise ValueError(
            f"a map shows single heads, neurons or layers, or groups at several positions: these effects are of "
            f"{shape[0]} groups; see top() and show()"
        )
    y = "" if effects.positions is None else "position" if effects.tokens is None else "token"
    if effects.groups is not None:
        return Maps(units[None], (), names, [_short(name) for name in effects.groups], y, "group")
    layers: list[int | str] = list(range(units.shape[1]))
    if units.ndim == 2:
        return Maps(units[None], (), names or [""], layers, y, "layer")
    inner: list[int | str] = list(range(units.shape[2]))
    titles = [f"position {at}" if effects.tokens is None else f"position {at}: {name}"
              for at, name in zip(effects.positions or (), names, strict=True)]  # fmt: skip
    if effects.site == "mlp_act":
        return Maps(units, titles, layers, inner, "layer", "neuron")
    return Maps(units.transpose(1, 2), titles, inner, layers, "head", "layer")


def draw(effects: Effects, path: str | Path, top: int, by: Ranking, title: str) -> None:
    """The maps as PNG."""
    maps = maps_of(effects)
    needed("matplotlib", "heat maps", extra="plots")
    marked = torch.zeros(len(effects._units), dtype=torch.bool)
    marked[effects._best(top, by) if top else []] = True
    label = f"mean effect on {effects.metric.replace('_', ' ')}"
    plots.effect_maps(
        path,
        effects.mean.flatten()[maps.units],
        marked[maps.units],
        label,
        (maps.rows, maps.columns),
        (maps.y, maps.x),
        maps.titles,
        title,
    )


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
