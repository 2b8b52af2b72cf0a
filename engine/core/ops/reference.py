"""The edit in plain loops: what the other implementations are compared with, bit by bit."""

from __future__ import annotations

from torch import Tensor

from engine.core.patches import Mode
from models.shapes import Bool, Float


def edit_heads(
    z: Float[Tensor, "rows tokens heads head_dim"],
    mask: Bool[Tensor, "rows heads"],
    values: Float[Tensor, "shared_or_rows heads head_dim"],
    mode: Mode,
) -> Float[Tensor, "rows tokens heads head_dim"]:
    """z[r, t, h] = values[r, h] where mask[r, h] ("replace"), or z[r, t, h] + values[r, h] ("add"), written to z."""
    n_rows, n_tokens, n_heads, _ = z.shape
    for r in range(n_rows):
        for h in range(n_heads):
            if mask[r, h]:
                value = values[r if len(values) > 1 else 0, h]
                for t in range(n_tokens):
                    z[r, t, h] = z[r, t, h] + value if mode == "add" else value
    return z
