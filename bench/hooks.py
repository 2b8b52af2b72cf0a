"""The loop everybody writes: one full forward a rollout, with hooks on the output projections. Plain transformers.

It takes the logits of all tokens and keeps the last one's, as everybody does: at short prompts with a large vocabulary
that is a fair share of its time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def patched_logits(
    hf: Any,
    projections: list[Any],
    ids: Tensor,
    mask: Tensor,
    values: Tensor,
    position: int = -1,
    inputs: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Last-token logits with masked heads replaced at one position: mask [L, H], values [L, H, D]. inputs: pixels."""

    def hook(layer: int) -> Any:
        def pre(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0].clone().unflatten(-1, values.shape[1:])  # [1, T, H, D]
            z[0, position, mask[layer]] = values[layer, mask[layer]]
            return (z.flatten(-2), *args[1:])

        return pre

    handles = [p.register_forward_pre_hook(hook(layer)) for layer, p in enumerate(projections)]
    try:
        return (
            hf(input_ids=ids[None], **(inputs or {})).logits[0, -1].clone()
        )  # a view would keep the logits of all tokens
    finally:
        for handle in handles:
            handle.remove()
