"""What rows at a site cost, against a loop of hooked forwards: 32 rows of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

import engine
from bench.timing import interleaved, ratio
from models import Model, Site

SAMPLE = 2  # rows that the loop runs a round, of 32


@torch.no_grad()
def rows(
    model: Model, sites: Sequence[Site] = get_args(Site), tokens: int = 512, n_rows: int = 32, rounds: int = 3
) -> dict[str, Any]:
    """The loop over ours, prefix fresh and reused, of masks that half of the units of every layer are in."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(model.shape.vocab_size, (tokens,), generator=random)
    found: dict[str, Any] = {}
    for site in sites:
        patch, few = _patches(model, site, n_rows, tokens, random)
        prefix = engine.prefill(model, ids)
        want = engine.naive.patch(model, ids, few)
        got = engine.patch(model, ids, patch, strategy="packed")[:SAMPLE]
        ways: dict[str, Callable[[], object]] = {
            "loop": partial(engine.naive.patch, model, ids, few),
            "fresh": partial(engine.patch, model, ids, patch, strategy="packed"),
            "reused": partial(engine.patch, model, prefix, patch, strategy="packed"),
        }
        seconds = interleaved(ways, rounds, progress=False)
        loop = [n_rows / SAMPLE * taken for taken in seconds["loop"]]
        found[f"{site}, fresh"] = ratio(loop, seconds["fresh"])
        found[f"{site}, reused"] = ratio(loop, seconds["reused"])
        found[f"{site}, apart"] = f"{(got - want).abs().max() / want.abs().max():.1e} of the largest logit"
    return found


def _patches(
    model: Model, site: Site, n_rows: int, tokens: int, random: torch.Generator
) -> tuple[engine.Patch, engine.Patch]:
    """All rows, and the first of them."""
    size = model.site(site)
    units = torch.rand(n_rows, size.n_layers, size.units, generator=random) < 0.5
    values: Tensor | float = 0.5
    if size.width:
        values = torch.randn(size.n_layers, size.units, size.width, generator=random)
    mode = "replace" if size.width else "scale"
    return engine.Patch(site, units, values, -1, mode), engine.Patch(site, units[:SAMPLE], values, -1, mode)  # type: ignore[arg-type]
