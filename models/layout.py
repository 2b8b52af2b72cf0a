"""A packed sequence: where each token lies, what each may see, and which rows are in.

The sequence is [contexts of all segments | rows of all segments], one batch entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from models.calls import Hook
from models.interface import KeyValues, Segment, UnsupportedModelError
from models.shapes import Bool, Float, Int


@dataclass(frozen=True)
class Rows:
    """Where the rows are in a packed sequence [1, tokens, ...]: at its end. counts: those that are in, by layer."""

    n_tokens: int
    counts: Sequence[int]

    def of(self, x: Tensor, layer: int) -> Tensor:
        """A view [rows, n_tokens, ...]; of the last layer, whose modules may have skipped the contexts, too."""
        return x[0, x.shape[1] - self.counts[layer] * self.n_tokens :].unflatten(0, (-1, self.n_tokens))


class Sees:
    """Which keys a query may see, by the places of both in their text; stands where a mask would."""

    def __init__(self, function: Callable[..., Tensor]):
        self.function = function

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "ndim", "dtype", "device", "dim", "size"):
            raise UnsupportedModelError("its code reads the attention mask itself, which packed rows do not have")
        raise AttributeError(name)

    def __call__(self, queries: Int[Tensor, " queries"], keys: Int[Tensor, " keys"]) -> Bool[Tensor, "queries keys"]:
        zero = queries.new_zeros(())  # of the batch, of the heads
        return self.function(zero, zero, queries[:, None], keys).expand(len(queries), len(keys))


@lru_cache
def causal(window: int | None) -> Sees:
    """All keys up to the query's own; none further back than the window."""
    from transformers import masking_utils

    plain = masking_utils.causal_mask_function
    return Sees(plain if window is None else masking_utils.sliding_window_causal_mask_function(window))


class Layout:
    """Where each token of a packed sequence lies, and the keys and values kept on the way."""

    def __init__(self, segments: Sequence[Segment], keep: bool, n_layers: int):
        self.segments = segments
        self.keep = keep
        self.n_layers = n_layers  # after the last, nothing reads the contexts
        self.n_rows, self.n_tokens = segments[0].rows.shape
        self.first_row = sum(segment.n_computed for segment in segments)
        self.contexts = [s.context if isinstance(s.context, KeyValues) else KeyValues() for s in segments]
        self.own = [KeyValues() for _ in segments]
        self._masks: dict[Any, Tensor | None] = {}

    def tokens(self) -> Int[Tensor, "1 sequence"]:
        contexts = [s.context for s in self.segments if isinstance(s.context, Tensor)]
        return torch.cat([*contexts, *(s.rows.flatten() for s in self.segments)])[None]

    def positions(self, device: torch.device) -> Int[Tensor, "1 sequence"]:
        """Rows continue their context: all rows of a segment stand at the same positions."""
        contexts = [torch.arange(s.n_computed, device=device) for s in self.segments]
        starts = [s.position for s in self.segments]
        rows = [(start + torch.arange(self.n_tokens, device=device)).repeat(self.n_rows) for start in starts]
        return torch.cat([*contexts, *rows])[None]

    def last_tokens(self, places: int = 1) -> slice | Int[Tensor, " rows_places"]:
        """Where in the sequence the last tokens of every row are, so many of each.

        A slice where it can be, else an index on the CPU: the last layer may be on any device.
        """
        if places in (0, self.n_tokens):
            return slice(self.first_row, None if places else 0)
        if places == 1:
            return slice(self.first_row + self.n_tokens - 1, None, self.n_tokens)
        tokens = self.first_row + torch.arange(len(self.segments) * self.n_rows * self.n_tokens)
        return tokens.view(-1, self.n_tokens)[:, -places:].flatten()

    def by_row(self, x: Float[Tensor, "rows_places vocab"], places: int) -> Float[Tensor, "segments rows *n vocab"]:
        """Logits at `last_tokens`, by segment and row; with an axis of their own if there are several a row."""
        sizes = (len(self.segments), self.n_rows if places else 0)
        return x.unflatten(0, sizes if places < 2 else (*sizes, places))

    def rows(self) -> Rows:
        """Of all segments; with `entry` they come in later."""
        entry = self.segments[0].entry or (0,) * (len(self.segments) * self.n_rows)
        return Rows(self.n_tokens, [sum(at <= layer for at in entry) for layer in range(self.n_layers)])

    def rows_in(self, length: int) -> int:
        """Rows of each segment that are in, in a layer whose sequence is so long: with `entry` they come in later."""
        return (length - self.first_row) // (len(self.segments) * max(1, self.n_tokens))

    def context_mask(self, n_tokens: int, sees: Sees, device: torch.device) -> Bool[Tensor, "tokens tokens"] | None:
        """What tokens that follow nothing see of each other; None: all up to themselves."""
        if sees is causal(None):
            return None
        if (n_tokens, sees) not in self._masks:
            places = torch.arange(n_tokens, device=device)
            mask = sees(places, places)
            plain = device.type == "cpu" and bool(mask[-1, 0]) and mask.equal(torch.ones_like(mask).tril())
            self._masks[n_tokens, sees] = None if plain else mask
        return self._masks[n_tokens, sees]

    def rows_mask(self, index: int, sees: Sees, device: torch.device) -> Bool[Tensor, "tokens keys"] | None:
        """Which of the keys [context | own] each token of a row of this segment sees; None: all of them."""
        segment = self.segments[index]
        static = segment.length is None
        if static and self.n_tokens == 1 and sees is causal(None):
            return None
        if (index, sees, "rows") not in self._masks:
            length = segment.n_context if segment.length is None else segment.length
            context = torch.arange(segment.n_context, device=device)
            own = length + torch.arange(segment.n_past + self.n_tokens, device=device)
            mask = sees(own[segment.n_past :], torch.cat([context, own]))  # [K, S + n_past + K]
            if not static:
                mask = torch.cat([mask[:, : segment.n_context] & (context < length), mask[:, segment.n_context :]], 1)
            full = static and device.type == "cpu" and bool(mask.all())
            self._masks[index, sees, "rows"] = None if full else mask
        return self._masks[index, sees, "rows"]


@contextmanager
def entering(blocks: Sequence[nn.Module], layout: Layout) -> Iterator[None]:
    """Within: rows of a segment with `entry` stay out of the blocks before theirs.

    The embedding and what follows the last block see all of them. What else a block is given token by token (positions,
    rotary tables) is cut to the rows that are in.
    """
    whole = layout.first_row + layout.n_rows * layout.n_tokens
    first = slice(layout.first_row, layout.first_row + layout.n_tokens)
    entry = layout.segments[0].entry

    def cut(x: Any, length: int) -> Any:
        if isinstance(x, tuple):
            return tuple(cut(part, length) for part in x)
        if not isinstance(x, Tensor) or 1 not in x.shape[:-1]:
            return x
        dim = x.shape.index(1) + 1  # [.., 1, tokens, ..]: tokens follow the batch
        return x.narrow(dim, 0, length) if x.shape[dim] == whole else x

    def enter(n_rows: int) -> Any:
        length = layout.first_row + n_rows * layout.n_tokens

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
            hidden = args[0] if args else kwargs["hidden_states"]  # [1, tokens, d_model]
            new = (length - hidden.shape[1]) // layout.n_tokens
            if new > 0:
                hidden = torch.cat([hidden, hidden[:, first].repeat(1, new, 1)], dim=1)
            hidden = hidden[:, :length]
            others = {key: cut(x, length) for key, x in kwargs.items() if key != "hidden_states"}
            if not args:
                return (), {"hidden_states": hidden, **others}
            return (hidden, *(cut(x, length) for x in args[1:])), others

        return Hook(hook)

    handles = []
    try:
        for layer, block in enumerate(blocks if entry else ()):
            n_in = sum(at <= layer for at in entry)
            handles.append(block.register_forward_pre_hook(enter(n_in), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
