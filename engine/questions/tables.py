"""Tables of effects: a row for each prompt and unit, a row for each unit, and the few rows that a notebook shows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from engine.questions.effects import Effects
from engine.questions.maps import visible
from engine.questions.pages import markup
from engine.questions.statistics import Correction, needed
from models.shapes import Integer

BRIEF = 10  # rows that a notebook shows


def of_prompts(effects: Effects) -> Any:
    """A data frame: a row for each prompt and unit."""
    pandas = needed("pandas", "data frames")
    n, units = len(effects.patched), len(effects._units)
    columns: dict[str, Any] = {"prompt": [i for i in range(n) for _ in range(units)]}
    columns |= {name: values * n for name, values in unit_columns(effects).items()}
    columns["patched"] = _flat(effects.patched)
    columns["clean"] = _flat(effects.clean).repeat(units)
    columns["effect"] = _flat(effects.effect)
    if effects.reference is not None:
        columns["reference"] = _flat(effects.reference).repeat(units)
        columns["normalised"] = _flat(effects.normalised)
    return pandas.DataFrame(columns)


def of_units(effects: Effects, level: float, correction: Correction | None, resamples: Integer, seed: Integer) -> Any:
    """A data frame: a row for each unit, and how sure it is."""
    pandas = needed("pandas", "data frames")
    low, high = effects.interval(level, resamples, seed)
    numbers = {"mean": effects.mean, "standard_error": effects.standard_error, "low": low, "high": high}
    numbers["p"] = effects.p_values(correction, resamples, seed)
    return pandas.DataFrame(unit_columns(effects) | {name: _flat(tensor) for name, tensor in numbers.items()})


def unit_columns(effects: Effects) -> dict[str, list[Any]]:
    """What each unit is called, part by part: position, layer and head, neuron or group."""
    names = [name.removesuffix("s") for name in effects._dimensions[1:]]
    rows = [unit if isinstance(unit, tuple) else (unit,) for unit in effects._units]
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def brief(effects: Effects) -> str:
    """The units of the largest mean effect as HTML; nothing is resampled."""
    best = effects._best(min(BRIEF, len(effects._units)), "absolute")
    parts = unit_columns(effects)
    if effects.tokens is not None:
        each = len(effects._units) // len(effects.tokens)
        parts["token"] = [visible(text) for text in effects.tokens for _ in range(each)]
    columns: dict[str, list[Any]] = {name: [values[i] for i in best] for name, values in parts.items()}
    columns["mean effect"] = [f"{x:.4g}" for x in effects.mean.flatten()[best].tolist()]
    if len(effects.patched) > 1:
        columns["standard error"] = [f"{x:.2g}" for x in effects.standard_error.flatten()[best].tolist()]
    rows = zip(*columns.values(), strict=True)
    head = "".join(f"<th>{markup(name)}</th>" for name in columns)
    body = "\n".join("<tr>" + "".join(f"<td>{markup(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    more = f"the {len(best)} largest of {len(effects._units):,}; show() has more, and how sure they are"
    return (
        f"<p>{markup(repr(effects))}</p>\n<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>\n"
        f"<p>{more}</p>"
    )


def _flat(x: Tensor) -> Any:
    return x.detach().cpu().flatten().numpy()
