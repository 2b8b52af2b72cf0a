"""The edit in plain loops: what the other implementations are compared with, bit by bit."""

from __future__ import annotations

from torch import Tensor

from engine.core.patches import Mode
from models.shapes import Bool, Float


def edit_heads(
    z: Float[Tensor, "rows tokens heads head_dim"],
    mask: Bool[Tensor, "rows heads"],
    values: Float[Tensor, "shared_or_rows shared_or_tokens heads head_dim"],
    mode: Mode,
) -> Float[Tensor, "rows tokens heads head_dim"]:
    """Where mask[r, h], z[r, t, h] becomes values[r, t, h], their sum or their product; written to z."""
    n_rows, n_tokens, n_heads, _ = z.shape
    for r in range(n_rows):
        for h in range(n_heads):
            for t in range(n_tokens) if mask[r, h] else ():
                value = values[r if len(values) > 1 else 0, t if values.shape[1] > 1 else 0, h]
                old = z[r, t, h].clone()  # which a gradient needs as it was
                z[r, t, h] = value if mode == "replace" else old + value if mode == "add" else old * value
    return z
