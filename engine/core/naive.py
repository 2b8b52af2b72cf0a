"""The definition of right, and the baseline of every benchmark: one hooked forward a row, nothing shared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.core.patches import Heads, Mode, Patch, Positions, Steering, Values, read_patch
from engine.core.prefix import Prefix, Prompts, as_prefixes, patched_positions
from models import Edit, Model, Steer
from models.shapes import Float


def patch(
    model: Model,
    prompt: Prompts,
    *,
    heads: Heads = None,
    values: Values = None,
    positions: Positions = -1,
    mode: Mode = "replace",
    steering: Steering | None = None,
    strategy: str = "naive",
) -> Float[Tensor, "*prompts rows vocab"]:
    """As `engine.patch`, by R full forwards a prompt.

    >>> logits = engine.naive.patch(model, "Q: hot\\nA:", heads=[(10, 3)], values=means)
    """
    if strategy != "naive":
        raise ValueError(f"engine.core.naive.patch has one strategy, 'naive', got {strategy!r}")
    checked = read_patch(model, heads, values, positions, mode, steering)
    several, prompts = as_prefixes(model, prompt)
    for one in prompts:
        patched_positions(checked, one)  # before anything runs
    with torch.set_grad_enabled(torch.is_grad_enabled() and checked.values.requires_grad):
        logits = torch.stack([rows(model, checked, p) for p in prompts])
    return logits if several else logits[0]


def rows(model: Model, patch: Patch, prompt: Prefix, rounding: bool = False) -> Float[Tensor, "rows *places vocab"]:
    """One hooked forward for each row of one prompt; rounding: every head's output is rounded once more."""
    logits = []
    for row in range(patch.n_rows):
        edit, steer = row_edit(model, patch, row, patch.at(len(prompt.tokens)))
        if rounding:
            edit = _rounded(edit, model.dtype)
        tokens, inputs = prompt.tokens[None], prompt.prompt.inputs
        logits.append(model.forward(tokens, edit, inputs=inputs, steer=steer, logits=prompt.places)[0])
    return torch.stack(logits)


def row_edit(model: Model, patch: Patch, row: int, positions: Sequence[int]) -> tuple[Edit, Steer | None]:
    """What one row does to z, and to the residual stream, of a forward [1, tokens, ...]."""
    heads = model.own_heads(patch.heads[row].to(model.device), -1)
    values = (patch.values[row] if patch.values.ndim == 4 else patch.values).to(model.device, model.dtype)
    values = model.own_heads(values, -2)

    def edit(layer: int, z: Tensor) -> Tensor:
        on, new = heads[layer].to(z.device), values[layer][:, : z.shape[-1]].to(z)  # z: [1, T, H, D]
        for position in positions:
            before = z[0, position, on] if patch.mode == "add" else 0
            z[0, position, on] = before + new[on]
        return z

    def add(h: Tensor) -> Tensor:  # [1, T, d_model]
        h = h.clone()
        for position in positions:
            h[0, position] += patch.steering.vector.to(h)  # type: ignore[union-attr]
        return h

    after = patch.steered_after[row]
    return edit, None if after is None else {after: add}


def _rounded(edit: Edit, dtype: torch.dtype) -> Edit:
    """The edit, and then a relative change of one unit in the last place, up or down, of everything.

    At least of float32's: whatever their dtype, models compute norms and softmaxes in it.
    """
    random, eps = torch.Generator().manual_seed(0), max(torch.finfo(x).eps for x in (dtype, torch.float32))

    def rounded(layer: int, z: Tensor) -> Tensor:
        z = edit(layer, z)
        sign = torch.randint(2, z.shape, generator=random).mul_(2).sub_(1)
        return z + z * (eps * sign.to(z))

    return rounded
