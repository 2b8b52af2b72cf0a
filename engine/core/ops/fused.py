"""The edit by `torch.where`: any device, any dtype, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.core.patches import Mode
from models.shapes import Bool, Float


def edit_heads(
    z: Float[Tensor, "rows tokens heads head_dim"],
    mask: Bool[Tensor, "rows heads"],
    values: Float[Tensor, "shared_or_rows heads head_dim"],
    mode: Mode,
    in_place: bool,
) -> Float[Tensor, "rows tokens heads head_dim"]:
    """z[r, t, h] = values[r, h] where mask[r, h] ("replace"), or z[r, t, h] + values[r, h] ("add")."""
    mask, values = mask[:, None, :, None], values[:, None]
    new = values if mode == "replace" else z + values
    return torch.where(mask, new, z, out=z) if in_place else torch.where(mask, new, z)
