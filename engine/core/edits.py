"""Patches as edits: what a forward of their rows does at every site and layer. One function, for all callers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from engine.core import patches
from engine.core.ops import edit_heads
from engine.core.patches import Change, Mode, Patches
from models import Edit, Edits, Model, Site
from models.shapes import Bool, Float

# Of a change: tokens of a row, in order, and the number of the position that each is at.
Tokens: TypeAlias = Sequence[tuple[int, int]]


class Ready:
    """Mask and values of a change, on the devices and in the dtypes of what they meet.

    mask: [L, rows, U]. values: [L or 1, rows or 1, P or 1, U or 1, W or 1].
    """

    def __init__(self, model: Model, change: Change, n_prompts: int = 1):
        mask, values = change.units.to(model.device), change.values
        assert values is not None
        values = values.to(model.device, model.dtype)
        if change.site == "z":  # shared out over processes
            mask = model.own_heads(mask, -1)
            values = model.own_heads(values, -2) if values.shape[-2] > 1 else values
        values = values.permute(2, 0, 1, 3, 4)
        self.mask = mask.transpose(0, 1).repeat(1, n_prompts, 1)
        self.values = values.repeat(1, n_prompts, 1, 1, 1) if values.shape[1] > 1 else values
        self._at = {(model.device, model.dtype): (self.mask, self.values)}

    def own(self) -> None:
        """Make mask and values buffers that nobody else holds."""
        self.mask, self.values = self.mask.clone(), self.values.clone()
        self._at = {(self.values.device, self.values.dtype): (self.mask, self.values)}

    def at(
        self, layer: int, x: Tensor
    ) -> tuple[Bool[Tensor, "rows units"], Float[Tensor, "rows_or_1 positions_or_1 units width"]]:
        """Of a layer, for x[rows, tokens, units, width]: rows that are still to come in are the last ones, and a layer
        may have fewer units, and narrower ones, than the widest.
        """
        if (x.device, x.dtype) not in self._at:
            self._at[x.device, x.dtype] = self.mask.to(x.device), self.values.to(x.device, x.dtype)
        mask, values = self._at[x.device, x.dtype]
        values = values[layer if len(values) > 1 else 0][: len(x), :, : x.shape[2], : x.shape[3]]
        if 1 < values.shape[-1] < x.shape[-1]:  # attention over tokens that follow the prompt
            values = pad(values, (0, x.shape[-1] - values.shape[-1]))
        return mask[layer][: len(x), : x.shape[2]], values.expand(-1, -1, *x.shape[2:])


def make_edits(
    model: Model,
    changes: Sequence[tuple[Change, Tokens]],
    n_prompts: int = 1,
    n_tokens: int = 0,
) -> Edits:
    """What changes do to rows [prompts * rows, tokens, units, width], every prompt having the same rows.

    changes: with the tokens, counted within a row, that each acts at. n_tokens: of the prompt, of which keys go out.
    """
    edits: dict[Site, dict[int, list[Edit]]] = {}
    for change, tokens in changes:
        if not tokens:
            continue
        act = _act(model, change, tokens, n_prompts, n_tokens)
        for layer in change.units.any(dim=2).any(dim=0).nonzero().flatten().tolist():
            edits.setdefault(change.site, {}).setdefault(layer, []).append(partial(act, layer))
    return {site: {layer: in_order(each) for layer, each in by_layer.items()} for site, by_layer in edits.items()}


def placed(rows: Patches, n_tokens: int, first: int = 0) -> list[tuple[Change, Tokens]]:
    """Each change with its tokens in rows that begin at token `first` of a prompt."""
    return [(change, at_tokens(change, n_tokens, first)) for change in rows.each]


def at_tokens(change: Change, n_tokens: int, first: int = 0) -> Tokens:
    by_token = {at - first: p for p, at in enumerate(change.at(n_tokens))}
    return sorted(by_token.items())


def keeping(
    edits: Edits,
    sites: Sequence[Site],
    n_layers: int,
    keep: Callable[[Site, int, Tensor], object],
    before: Collection[Site] = (),
) -> Edits:
    """The edits; and keep(site, layer, x) is given what they leave at these sites; at some of them, what they meet."""

    def kept(site: Site, layer: int, x: Tensor) -> Tensor:
        keep(site, layer, x)
        return x

    found: dict[Site, dict[int, Edit]] = {site: dict(by_layer) for site, by_layer in edits.items()}
    for site in sites:
        by_layer = found.setdefault(site, {})
        for layer in range(n_layers):
            here: Edit = partial(kept, site, layer)
            both = [by_layer[layer], here] if layer in by_layer else [here]
            by_layer[layer] = in_order(both[::-1] if site in before else both)
    return found


def in_order(each: list[Edit]) -> Edit:
    if len(each) == 1:
        return each[0]

    def one_after_the_other(x: Tensor) -> Tensor:
        for edit in each:
            x = edit(x)
        return x

    return one_after_the_other


def _act(
    model: Model, change: Change, tokens: Tokens, n_prompts: int, n_tokens: int
) -> Callable[[int, Tensor], Tensor]:
    if isinstance(change.given, patches.Knockout):
        return partial(_knock_out, change, [token for token, _ in tokens], n_tokens)
    if isinstance(change.given, patches.Edit):
        return partial(_call, change, change.given, [token for token, _ in tokens], n_prompts)
    return partial(patch_units, Ready(model, change, n_prompts), spans(tokens, change), change.mode)


def patch_units(
    ready: Ready,
    where: Sequence[tuple[slice, slice]],
    mode: Mode,
    layer: int,
    x: Float[Tensor, "rows tokens units width"],
) -> Float[Tensor, "rows tokens units width"]:
    """X is written to and returned; a new tensor where gradients are recorded."""
    mask, values = ready.at(layer, x)
    for span, positions in where:
        part = x[:, span]
        edited = edit_heads(part, mask, values[:, positions], mode)
        if edited is not part:
            x = x.slice_scatter(edited, 1, span.start, span.stop)
    return x


def spans(tokens: Tokens, change: Change) -> list[tuple[slice, slice]]:
    """Tokens in order as the fewest slices, with those of the positions whose values they take.

    >>> spans([(0, 0), (1, 1), (5, 2)], change)
    [(slice(0, 2, None), slice(0, 2, None)), (slice(5, 6, None), slice(2, 3, None))]
    """
    found: list[tuple[slice, slice]] = []
    alike = change.values is None or change.values.shape[1] == 1
    for token, p in tokens:
        last, at = found[-1] if found else (slice(-1, -1), slice(-1, -1))
        if last.stop == token and (alike or at.stop == p):
            found[-1] = slice(last.start, token + 1), slice(0, 1) if alike else slice(at.start, p + 1)
        else:
            found.append((slice(token, token + 1), slice(0, 1) if alike else slice(p, p + 1)))
    return found


def _knock_out(change: Change, tokens: Sequence[int], n_tokens: int, layer: int, scores: Tensor) -> Tensor:
    """Scores [rows, tokens, heads, keys]: of no key that is out, in the heads where it is."""
    keys = torch.zeros(len(scores), scores.shape[-1], dtype=torch.bool)
    for row, out in enumerate(change.keys[: len(scores)]):
        keys[row, [key % n_tokens for key in out]] = True
    heads = change.units[: len(scores), layer, : scores.shape[2]].to(scores.device)  # [R, H]
    at = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
    at[list(tokens)] = True
    hidden = at[None, :, None, None] & heads[:, None, :, None] & keys.to(scores.device)[:, None, None]
    return scores.masked_fill(hidden, float("-inf"))


def _call(
    change: Change, edit: patches.Edit, tokens: Sequence[int], n_prompts: int, layer: int, x: Tensor
) -> Float[Tensor, "rows tokens units width"]:
    """The caller's function, of the rows and tokens that are its own."""
    on = change.units[:, layer].any(dim=-1).repeat(n_prompts)[: len(x)].nonzero().flatten().to(x.device)
    at = torch.tensor(tokens, device=x.device)
    given = x[on[:, None], at]  # [rows, positions, units, width]: a copy
    found = read_edited(edit, given, edit.function(layer, given))
    return x.index_put((on[:, None], at), found.to(x))


def read_edited(edit: patches.Edit, given: Tensor, found: Any) -> Tensor:
    """What a caller's function returns. Raises ValueError for anything but a tensor of the shape that was given."""
    if not isinstance(found, Tensor) or found.shape != given.shape:
        got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"the function of an Edit of {edit.site} must return a tensor {list(given.shape)}, got {got}")
    return found
