"""The edit by `torch.where`: any device, any dtype, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.core.patches import Mode
from models.shapes import Bool, Float


def edit_heads(
    z: Float[Tensor, "rows tokens heads head_dim"],
    mask: Bool[Tensor, "rows heads"],
    values: Float[Tensor, "shared_or_rows shared_or_tokens heads head_dim"],
    mode: Mode,
    in_place: bool,
) -> Float[Tensor, "rows tokens heads head_dim"]:
    """Where mask[r, h], z[r, t, h] becomes values[r, t, h], their sum or their product."""
    mask = mask[:, None, :, None]
    if mode == "scale" and not in_place:  # nothing of what is not scaled in gradients, not even as NaN
        return torch.where(mask, z.masked_fill(~mask, 0) * values, z)
    new = values if mode == "replace" else z + values if mode == "add" else z * values
    return torch.where(mask, new, z, out=z) if in_place else torch.where(mask, new, z)
