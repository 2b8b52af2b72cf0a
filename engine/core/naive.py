"""The definition of right, and the baseline of every benchmark: one hooked forward a row, nothing shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

import models
from engine.core.edits import Tokens, placed, read_edited
from engine.core.patches import Change, Edit, Heads, Knockout, Mode, One, Patches, Positions, Values
from engine.core.prefix import Prefix, Prompts, as_prefixes, patched_positions
from engine.core.reading import read_patches
from models import Edits, Model, Site
from models.shapes import Float


def patch(
    model: Model,
    prompt: Prompts,
    patches: One | Sequence[One] | None = None,
    *,
    heads: Heads = None,
    values: Values = None,
    positions: Positions = -1,
    mode: Mode = "replace",
    strategy: str = "naive",
) -> Float[Tensor, "*prompts rows vocab"]:
    """As `engine.patch`, by R full forwards a prompt.

    >>> logits = engine.naive.patch(model, "Q: hot\\nA:", heads=[(10, 3)], values=means)
    """
    if strategy != "naive":
        raise ValueError(f"engine.naive.patch has one strategy, 'naive', got {strategy!r}")
    checked = read_patches(model, patches, heads, values, positions, mode)
    several, prompts = as_prefixes(model, prompt)
    for one in prompts:
        patched_positions(checked, one)  # before anything runs
    with torch.set_grad_enabled(torch.is_grad_enabled() and checked.requires_grad):
        logits = torch.stack([rows(model, checked, p) for p in prompts])
    return logits if several else logits[0]


def rows(model: Model, patch: Patches, prompt: Prefix, rounding: bool = False) -> Float[Tensor, "rows *places vocab"]:
    """One hooked forward for each row of one prompt; rounding: every head's output is rounded once more."""
    logits, n_tokens = [], len(prompt.tokens)
    for row in range(patch.n_rows):
        edits = row_edits(model, row, placed(patch, n_tokens), n_tokens)
        if rounding:
            edits = {**edits, "z": _rounded(edits.get("z", {}), model)}
        logits.append(model.forward(prompt.tokens[None], edits, inputs=prompt.prompt.inputs, logits=prompt.places)[0])
    return torch.stack(logits)


def row_edits(model: Model, row: int, changes: Sequence[tuple[Change, Tokens]], n_tokens: int) -> Edits:
    """What changes do to one row, a forward [1, tokens, ...], at these tokens. n_tokens: of the prompt."""
    acts: dict[Site, dict[int, list[models.Edit]]] = {}  # the changes of a site and layer, in order
    for change, tokens in changes:
        for layer in change.units[row].any(dim=1).nonzero().flatten().tolist():
            act = partial(_act, model, change, row, layer, tokens, n_tokens)
            acts.setdefault(change.site, {}).setdefault(layer, []).append(act)
    return {site: {layer: partial(_all, each) for layer, each in by.items()} for site, by in acts.items()}


def _all(each: Sequence[models.Edit], x: Tensor) -> Tensor:
    for act in each:
        x = act(x)
    return x


def _act(model: Model, change: Change, row: int, layer: int, tokens: Tokens, n_tokens: int, x: Tensor) -> Tensor:
    """X [1, tokens, units, width]: one token after the other."""
    on = change.units[row, layer]
    on = (model.own_heads(on.to(model.device), -1) if change.site == "z" else on).to(x.device)[: x.shape[2]]
    for token, p in tokens:
        x = x.clone()
        if isinstance(change.given, Knockout):
            for key in change.keys[row]:
                x[0, token, on, key % n_tokens] = float("-inf")
        elif isinstance(change.given, Edit):
            given = x[:, token : token + 1].clone()
            x[0, token] = read_edited(change.given, given, change.given.function(layer, given))[0, 0]
        else:
            x[0, token, on] = _becomes(change.mode, x[0, token, on], _value(model, change, row, layer, p, x)[on])
    return x


def _becomes(mode: Mode, was: Tensor, value: Tensor) -> Tensor:
    return value if mode == "replace" else was + value if mode == "add" else was * value


def _value(model: Model, change: Change, row: int, layer: int, p: int, x: Tensor) -> Float[Tensor, "units width"]:
    """Of a row, a position and a layer, as many as there are there."""
    assert change.values is not None
    mine = change.values[min(row, len(change.values) - 1)]
    mine = mine[min(p, len(mine) - 1)]
    mine = mine[min(layer, len(mine) - 1)].to(model.device, model.dtype).to(x)
    mine = model.own_heads(mine, -2) if change.site == "z" and len(mine) > 1 else mine
    mine = mine[: x.shape[2], : x.shape[3]]
    if 1 < mine.shape[1] < x.shape[3]:  # attention over tokens of an answer, too
        mine = torch.cat([mine, mine.new_zeros(len(mine), x.shape[3] - mine.shape[1])], dim=1)
    return mine.expand(x.shape[2:])


def _rounded(by_layer: Mapping[int, models.Edit], model: Model) -> dict[int, models.Edit]:
    """The edits, and then a relative change of one unit in the last place, up or down, of every head's output.

    At least of float32's: whatever their dtype, models compute norms and softmaxes in it.
    """
    random, eps = torch.Generator().manual_seed(0), max(torch.finfo(x).eps for x in (model.dtype, torch.float32))

    def rounded(layer: int, z: Tensor) -> Tensor:
        z = by_layer[layer](z) if layer in by_layer else z
        sign = torch.randint(2, z.shape, generator=random).mul_(2).sub_(1)
        return z + z * (eps * sign.to(z))

    return {layer: partial(rounded, layer) for layer in range(model.shape.n_layers)}
