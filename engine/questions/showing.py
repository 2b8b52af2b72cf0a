"""From effects to a page: which of them are on it, under which names, with which numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine.questions.effects import Effects
from engine.questions.maps import Maps, maps_of, visible
from engine.questions.pages import Page, page
from engine.questions.statistics import Correction, bootstrap, check_correction
from models.reading import as_int, read_int
from models.shapes import Integer

MAPPED = 10_000  # units beyond which a page has no map: a browser is slow to draw so many


def page_of(
    effects: Effects,
    top: Integer,
    level: float,
    correction: Correction | None,
    resamples: Integer,
    seed: Integer,
    title: str,
) -> Page:
    """Raises ValueError for a `top` below 1, or options of the statistics that are none."""
    count, top = len(effects._units), read_int(top, "top")
    check_correction(correction)
    best = effects._best(min(top, count), "absolute")
    maps = None
    if count <= MAPPED and (effects.groups is None or effects.positions is not None):
        maps = maps_of(effects)
    shown = sorted(best) if maps is None else list(range(count))
    at = {unit: i for i, unit in enumerate(shown)}  # where a unit's numbers stand on the page
    numbers, notes = {"mean": effects.mean.flatten()[shown]}, []
    if len(effects.patched) > 1:
        numbers["error"] = effects.standard_error.flatten()[shown]
        numbers["low"], numbers["high"] = bootstrap(effects._over_prompts[:, shown], level, resamples, seed)
        numbers["p"] = effects.p_values(correction, resamples, seed).flatten()[shown]
        percent = f"{100 * level:.4g}%"
        corrected = f"corrected over {count:,} units ({correction})" if correction else "not corrected"
        notes.append(
            f"{percent} intervals of the mean effect: BCa bootstrap over prompts. p: two-sided sign-flip test over "
            f"prompts, {corrected}. At most {as_int(resamples):,} resamples, seed {as_int(seed)}."
        )
    else:
        percent = ""
        notes.append("One prompt: there are no intervals and no p-values.")
    if len(best) < count:
        where = "on this page" if maps is None else "in the table; the map has all"
        notes.insert(0, f"The {len(best):,} of {count:,} units with the largest mean effect, up or down, are {where}.")
    data = {
        "said": repr(effects),
        "prompts": len(effects.patched),
        "notes": notes,
        "level": percent,
        "parts": _parts(effects, shown),
        "numbers": {name: _rounded(tensor) for name, tensor in numbers.items()},
        "ranked": [at[unit] for unit in best],
        "maps": None if maps is None else _described(maps),
    }
    return page(title or f"Mean effect on {effects.metric.replace('_', ' ')}", data)


def _parts(effects: Effects, shown: Sequence[int]) -> list[dict[str, Any]]:
    """Of the units' names: what each part is, the names that it has, and which of them each unit has. Names stand in
    the order in which they were given, which is theirs when a table is sorted.
    """
    sizes = effects.patched.shape[1:]
    parts: list[dict[str, Any]] = []
    for axis, at in zip(effects._dimensions[1:], torch.unravel_index(torch.tensor(shown), sizes), strict=True):
        names: list[Any] = list(range(sizes[len(parts)]))
        if axis == "groups":
            names = list(effects.groups or ())
        if axis == "positions":
            texts = [""] * len(names) if effects.tokens is None else [f" {visible(text)}" for text in effects.tokens]
            names = [f"{name}{text}" for name, text in zip(effects.positions or (), texts, strict=True)]
        used, where = at.unique(return_inverse=True)
        said = [str(names[i]) for i in used.tolist()]
        parts.append({"name": axis.removesuffix("s"), "names": said, "at": where.tolist()})
    return parts


def _described(maps: Maps) -> dict[str, Any]:
    return {
        "units": maps.units.tolist(),
        "titles": list(maps.titles),
        "rows": list(maps.rows),
        "columns": list(maps.columns),
        "y": maps.y,
        "x": maps.x,
    }


def _rounded(numbers: Tensor) -> list[float | None]:
    """To six digits, which the page shows three of; None for what overflowed."""
    return [float(f"{x:.6g}") if finite else None
            for x, finite in zip(numbers.tolist(), torch.isfinite(numbers).tolist(), strict=True)]  # fmt: skip
