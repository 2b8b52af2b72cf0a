"""The edit itself: heads of z replaced, or added to, row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.intervention import Mode
from models.shapes import Bool, Float


def edit_heads(
    z: Float[Tensor, "rows tokens heads head_dim"],
    mask: Bool[Tensor, "rows 1 heads 1"],
    values: Float[Tensor, "shared_or_rows 1 heads head_dim"],
    mode: Mode,
) -> Float[Tensor, "rows tokens heads head_dim"]:
    """z[r, t, h] = values[r, h] where mask[r, h] ("replace"), or z[r, t, h] + values[r, h] ("add")."""
    return torch.where(mask, values if mode == "replace" else z + values, z)
