"""What rows at a site cost, against a loop of hooked forwards: 32 rows of each, and a map of layers x positions."""

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
TOGETHER = 4  # positions whose rows share a call
CELLS = 12  # forwards of the loop that are timed in a round, of layers * positions


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


@torch.no_grad()
def trace(model: Model, tokens: int = 16, rounds: int = 3) -> dict[str, Any]:
    """Every layer's resid_pre at every position, patched from another prompt: all layers of a position in one call,
    against a hook on a block of the model as it is, a forward a cell.
    """
    random = torch.Generator().manual_seed(0)
    ids, source = torch.randint(model.shape.vocab_size, (2, tokens), generator=random)
    layers, hf, blocks = model.shape.n_layers, model.hf, model.body.blocks  # type: ignore[attr-defined]
    values = engine.capture(model, [source], list(range(tokens)), sites="resid_pre")[0]  # [T, L, 1, d_model]
    each = torch.eye(layers, dtype=torch.bool)

    def ours(together: int) -> Tensor:
        """Rows of so many positions in a call; they begin at the first of these."""
        prefix, found = engine.prefill(model, ids), []
        for first in range(0, tokens, together):
            some = range(first, min(first + together, tokens))
            patches = []
            for n, p in enumerate(some):
                units = torch.zeros(len(some), layers, layers, dtype=torch.bool)
                units[n] = each
                patches.append(engine.Patch("resid_pre", units.flatten(0, 1), values[p], p))
            found.append(engine.patch(model, prefix, patches))
        return torch.cat(found)  # [T * L, vocab]

    cells = torch.linspace(0, tokens * layers - 1, CELLS).long().tolist()

    def loop() -> Tensor:
        return torch.stack(
            [_hooked(hf, blocks[c % layers], ids, c // layers, values[c // layers, c % layers, 0]) for c in cells]
        )

    want, got = loop(), torch.stack([ours(1)[cells], ours(TOGETHER)[cells]])
    ways: dict[str, Callable[[], object]] = {"loop": loop, "one": partial(ours, 1), "four": partial(ours, TOGETHER)}
    seconds = interleaved(ways, rounds, progress=False)
    taken = [tokens * layers / len(cells) * one for one in seconds["loop"]]
    rows_of = [
        (tokens - p) * (1 + (layers + 1) / 2) for p in range(tokens)
    ]  # one row of all layers, half of the others
    return {
        "tokens": tokens,
        "cells": tokens * layers,
        "loop / ours, a call a position": ratio(taken, seconds["one"]),
        f"loop / ours, a call for {TOGETHER} positions": ratio(taken, seconds["four"]),
        "counted tokens, loop / ours": round(tokens * tokens * layers / sum(rows_of), 1),
        "apart": f"{(got - want).abs().max():.1e}, the largest logit {want.abs().max():.0f}",
    }


def _hooked(hf: Any, block: Any, ids: Tensor, position: int, value: Tensor) -> Tensor:
    def put(_: Any, args: tuple[Tensor, ...], given: dict[str, Any]) -> Any:
        x = args[0].clone()
        x[0, position] = value
        return (x, *args[1:]), given

    handle = block.register_forward_pre_hook(put, with_kwargs=True)
    try:
        return hf(input_ids=ids[None], logits_to_keep=1, use_cache=False).logits[0, -1]
    finally:
        handle.remove()
