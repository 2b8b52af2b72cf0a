"""What a caller gives, to what a model takes: text or ids, integers, arrays; refused in words if it is none of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.interface import Prompt, PromptLike
from models.shapes import Int


def read_ids(prompt: PromptLike, tokenizer: Any, name: str) -> Int[Tensor, " tokens"]:
    """The token ids of a prompt for the model of this name.

    Warns of a beginning-of-text token that the text has and the tokenizer adds again. Raises TypeError or ValueError
    for what is neither text nor ids, text without a tokenizer, or an empty prompt.
    """
    if isinstance(prompt, Prompt):
        prompt = prompt.text
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"{name} was wrapped without a tokenizer: give token ids, or wrap(..., tokenizer=)")
        ids = torch.tensor(tokenise(prompt, tokenizer), dtype=torch.long)
        check_begin(prompt, ids, tokenizer)
    else:
        given = read_tensor(prompt, "token ids")
        try:
            ids = torch.as_tensor(given)
        except (RuntimeError, TypeError, ValueError) as error:
            raise TypeError(f"a prompt must be text, a Prompt or token ids, got {prompt!r:.80}") from error
        if ids.ndim != 1 or (ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)):
            raise ValueError(f"token ids must be one-dimensional integers, got {ids.dtype} of shape {tuple(ids.shape)}")
        if isinstance(given, (list, tuple)) and None in map(as_int, given):  # bools among integers
            raise ValueError(f"token ids must be one-dimensional integers, got {prompt!r:.80}")
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


def tokenise(text: str, tokenizer: Any, **options: Any) -> list[int]:
    """The ids that the tokenizer gives. Raises ValueError for text that is not Unicode."""
    check_text(text)
    return tokenizer(text, **options)["input_ids"]


def check_text(text: str) -> None:
    """Raises ValueError for half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = error.start
        raise ValueError(f"text must be Unicode, got a lone surrogate, {text[at]!a}, as character {at}") from None


def check_begin(text: str, ids: Int[Tensor, " tokens"], tokenizer: Any) -> None:
    """Warns if the text begins with the beginning-of-text token and the tokenizer put another before it."""
    bos = getattr(tokenizer, "bos_token", None)
    once = bos and text.startswith(bos) and not text.startswith(2 * bos)
    if once and ids[:2].tolist() == 2 * [tokenizer.bos_token_id]:
        said = f"the prompt begins with {bos!r} twice: its text has one, and the tokenizer adds one"
        warnings.warn(f"{said}; remove it from the text, or give token ids", stacklevel=2)


def as_int(number: Any) -> int | None:
    """An integer of Python's, numpy's or torch's as an int; None for anything else, bools too."""
    if isinstance(number, bool) or (isinstance(number, Tensor) and (number.ndim or number.dtype == torch.bool)):
        return None
    try:
        return index(number)
    except (TypeError, RuntimeError):
        return None


def read_int(number: Any, what: str, least: int | None = 1) -> int:
    """The number as an int. Raises ValueError for anything but an integer, and for one below `least`."""
    found = as_int(number)
    if found is None or (least is not None and found < least):
        wanted = "an integer" if least is None else "a positive integer" if least == 1 else f"an integer >= {least}"
        raise ValueError(f"{what} must be {wanted}, got {number!r}")
    return found


def read_seed(seed: Any) -> int:
    """The seed as an int. Raises ValueError for anything but an integer of 64 bits."""
    found = as_int(seed)
    if found is None or not -(2**63) <= found < 2**63:
        raise ValueError(f"seed must be an integer of 64 bits, got {seed!r}")
    return found


def read_tensor(given: Any, what: str) -> Any:
    """A numpy array as a tensor, all else as it is. Raises TypeError for a tensor that is sparse, nested or meta."""
    if isinstance(given, np.ndarray):
        try:
            return torch.from_numpy(np.array(given))  # a copy: torch shares neither read-only nor reversed memory
        except (TypeError, ValueError) as error:
            raise TypeError(f"{what} must be numbers that torch has, got a numpy array of {given.dtype}") from error
    if isinstance(given, Tensor) and (given.is_meta or given.is_nested or given.layout != torch.strided):
        kind = "on the device meta" if given.is_meta else "nested" if given.is_nested else f"of layout {given.layout}"
        raise TypeError(f"{what} must be a dense tensor with values, got one {kind}")
    return given


def read_list(given: Any) -> list[Any]:
    """What a sequence or an array holds; of anything else a list."""
    given = read_tensor(given, "integers")
    given = given.tolist() if isinstance(given, Tensor) else given
    return list(given) if isinstance(given, Sequence) else [given]
