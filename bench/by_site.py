"""Is every site exact in every family? Tiny random models: all strategies against naive of the plain backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch

import engine
import models
from bench.families import BACKENDS, LIMIT, STRATEGIES, requests, wrapped
from engine import naive
from engine.progress import track
from models import Model, Site, tiny

SITES: tuple[Site, ...] = get_args(Site)
HEAD = """# Sites, families, backends

Made by `python -m bench families --sites --write docs/sites.md`. Tiny random models with the real layouts, prompts
longer than every window, positions `-1` and `[-3, -1]`, replace and add (patterns: replace and scale); float32. Each
cell: the largest absolute logit difference to `engine.naive` by the plain backend, over all strategies that are not
refused, by their first letters (layered, packed, expanded, batch; naive always). Where that is more than 1e-5, the same
in float64 follows: what is left is rounding, or a part of the backend that computes in float32 even then. A dash: the
family does not have the site, and why is said below.
"""


@dataclass(frozen=True)
class Cell:
    """One site of a family by one backend. ran: strategies; refused: why it is not there.

    double: the difference in float64, where that in float32 is more than the limit.
    """

    family: str
    backend: str
    site: Site
    difference: float = 0.0
    ran: tuple[str, ...] = ()
    refused: str = ""
    double: float | None = None

    @property
    def exact(self) -> bool:
        return bool(self.refused) or self.difference <= LIMIT or (self.double is not None and self.double <= LIMIT)

    def __str__(self) -> str:
        letters = "".join(name[0] for name in self.ran if name != "naive")
        double = "" if self.double is None else f" (float64: {self.double:.0e})"
        return "-" if self.refused else f"{self.difference:.0e} {letters}{double}"


def measure(families: Sequence[str] = (), backends: Sequence[str] = BACKENDS) -> list[Cell]:
    """Cells of the families given; default all."""
    every = [(family, backend) for family in families or [*tiny.TEXT, *tiny.IMAGE_TEXT] for backend in backends]
    return [cell for one in track(every, "sites", True) for cell in cells(*one)]


def cells(family: str, backend: str = "huggingface", sites: Sequence[Site] = SITES) -> Iterator[Cell]:
    plain = wrapped(family)
    try:
        model = plain if backend == "huggingface" else wrapped(family, torch.float32, backend)
    except models.UnsupportedModelError as error:
        yield from (Cell(family, backend, site, refused=_said(error)) for site in sites)
        return
    for site in sites:
        try:
            model.site(site)
            plain.site(site)
        except models.UnsupportedModelError as error:
            yield Cell(family, backend, site, refused=_said(error))
            continue
        cell = _compared(Cell(family, backend, site), plain, model)
        if cell.difference > LIMIT:
            double, its = wrapped(family, torch.float64), wrapped(family, torch.float64, backend)
            cell = replace(cell, double=_compared(Cell(family, backend, site), double, its).difference)
        yield cell


def _compared(cell: Cell, plain: Model, model: Model) -> Cell:
    for prompt, patch in _asked(plain, cell.site):
        want = naive.patch(plain, prompt, patch)
        for strategy in (*STRATEGIES, "naive"):
            try:
                got = engine.patch(model, prompt, patch, strategy=strategy)
            except models.UnsupportedModelError:
                continue
            worst = max(cell.difference, (got - want).abs().max().item())
            cell = replace(cell, difference=worst, ran=tuple(dict.fromkeys((*cell.ran, strategy))))
    return cell


def _asked(model: Model, site: Site) -> Iterator[tuple[Any, engine.Patch]]:
    size, random = model.site(site), torch.Generator().manual_seed(0)
    units = torch.rand(4, size.n_layers, size.units, generator=random) < 0.4
    units[2:, : size.n_layers // 2] = False  # rows that may come in later
    units[:, -1, 0] = True
    for layer, (here, _) in enumerate(size.sizes):
        units[:, layer, here:] = False
    for asked in requests(model):
        mode, positions = asked["mode"], asked["positions"]
        tokens = len(model.encode(asked["prompt"]))
        if site == "pattern":
            values: Any = _patterns(tokens, positions, size, random) if mode == "replace" else 0.5
            mode = "replace" if mode == "replace" else "scale"
        else:
            values = torch.randn(size.n_layers, size.units, size.width or tokens, generator=random)
        yield asked["prompt"], engine.Patch(site, units, values, positions, mode)


def _patterns(tokens: int, positions: Sequence[int], size: models.SiteShape, random: torch.Generator) -> torch.Tensor:
    """Weights of all tokens up to each of the positions: Float[1, P, L, H, T]."""
    scores = torch.randn(1, len(positions), size.n_layers, size.units, tokens, generator=random)
    for p, position in enumerate(positions):
        scores[:, p, ..., position % tokens + 1 :] = -np.inf
    return scores.softmax(dim=-1)


def _said(error: Exception) -> str:
    return str(error).split(": ", 1)[-1]


def markdown(found: Sequence[Cell]) -> str:
    """The table of the documentation."""
    rows = ["| family | backend | " + " | ".join(SITES) + " |", "|---" * (len(SITES) + 2) + "|"]
    for family, backend in dict.fromkeys((cell.family, cell.backend) for cell in found):
        row = [str(cell) for cell in found if (cell.family, cell.backend) == (family, backend)]
        rows.append(f"| {family} | {backend} | " + " | ".join(row) + " |")
    why: dict[str, list[str]] = {}
    for cell in found:
        if cell.refused:
            why.setdefault(cell.refused, []).append(f"{cell.family} {cell.site} ({cell.backend})")
    said = [f"- {reason}: {', '.join(who)}." for reason, who in why.items()]
    return "\n".join([HEAD, *rows, "", "## Not there, and why", "", *said]) + "\n"
