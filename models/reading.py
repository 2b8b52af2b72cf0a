"""Text or token ids, as a caller gives them, to the ids that a model takes; refused in words if they are neither."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.interface import Prompt, PromptLike
from models.shapes import Int


def read_ids(prompt: PromptLike, tokenizer: Any, name: str) -> Int[Tensor, " tokens"]:
    """The token ids of a prompt for the model of this name.

    Raises TypeError or ValueError for what is neither text nor ids, text without a tokenizer, or an empty prompt.
    """
    if isinstance(prompt, Prompt):
        prompt = prompt.text
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"{name} was wrapped without a tokenizer: give token ids, or wrap(..., tokenizer=)")
        ids = torch.tensor(tokenizer(prompt)["input_ids"], dtype=torch.long)
    else:
        try:
            ids = torch.as_tensor(prompt)
        except (RuntimeError, TypeError, ValueError) as error:
            raise TypeError(f"a prompt must be text, a Prompt or token ids, got {prompt!r:.80}") from error
        if ids.ndim != 1 or (ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)):
            raise ValueError(f"token ids must be one-dimensional integers, got {ids.dtype} of shape {tuple(ids.shape)}")
        ids = ids.long()
    if not ids.numel():
        raise ValueError(f"the prompt is empty: {prompt!r} has no tokens")
    return ids


def check_ids(ids: Int[Tensor, " tokens"], vocab_size: int, max_tokens: int, name: str) -> None:
    """Raises ValueError for more tokens than the model takes, or ids that it does not have."""
    if ids.numel() > max_tokens:
        raise ValueError(f"the prompt has {ids.numel()} tokens, {name} takes at most {max_tokens}")
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(f"token ids must lie in [0, {vocab_size}), got {int(ids.min())} to {int(ids.max())}")
