"""Patches as data: at which site, which units of which layers become what, at which tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from models import Site
from models.shapes import Bool, Float, Integer

Mode: TypeAlias = Literal["replace", "add", "scale"]
# A mask [rows, layers, heads] or [layers, heads], or (layer, head) pairs for one row; None patches nothing.
Heads: TypeAlias = Tensor | np.ndarray | Sequence[Iterable[Integer]] | None
# Likewise of the units of a site; of one that has a single unit also [rows, layers], or a list of layers.
Units: TypeAlias = Tensor | np.ndarray | Sequence[Integer | Iterable[Integer]]
# [layers, units, width], for all rows or one set a row, for all positions or one a position.
Values: TypeAlias = Tensor | np.ndarray | None
Positions: TypeAlias = Integer | Sequence[Integer]  # arrays and tensors are of the first type


@dataclass(frozen=True, eq=False)
class Patch:
    """Units of a site that become other values, at some tokens of a prompt; a row each of R variants of it.

    site:      a named place in every layer, with U units of W numbers a token:
               "resid_pre", "resid_mid", "resid_post" (1 x d_model): the residual stream as a block is given it, after
               attention is added, as the block gives it (TransformerLens' hook_resid_pre, ...; a write to its
               hook_resid_mid reaches the skip connection only if made in place);
               "attn_out", "mlp_out" (1 x d_model): what W_O, and the MLP's last projection (of a mixture of experts all
               of it) give, before a norm that follows, as Gemma2's;
               "mlp_act" (d_ff x 1): neurons, what that projection is given (hook_post);
               "z" (heads x head_dim): what each head outputs, the input of W_O;
               "q" (heads x head_dim), "k", "v" (key/value heads x head_dim): as attention uses them, after norms,
               biases and rotary positions (hook_rot_q, hook_rot_k, hook_v, these before heads are repeated);
               "scores", "pattern" (heads x T): attention of a token over the T tokens of the prompt, scaled and capped,
               before and after the softmax; 0 and -inf after the token itself (hook_attn_scores, hook_pattern).
    units:     Bool[R, L, U], one row each; Bool[L, U] or a list of (layer, unit): one row. Of sites of one unit also
               Bool[R, L], or a list of layers.
    values:    Float[L, U, W] for all rows, or Float[R, L, U, W], one set a row; at each of P positions its own:
               Float[R or 1, P, L, U, W] (for one row also without the first axis); one vector Float[W], or a number.
    positions: tokens, negative ones counted from the end of the prompt. Default: the last.
    mode:      "replace" what is there by the values, "add" them to it, or "scale" it by them: 0 ablates.

    A patch of one row holds for all rows of those beside it; several at one site and layer act in the order given.

    Source: activation patching (arXiv 2404.15255); names of sites: TransformerLens.

    >>> steered = engine.Patch("resid_post", [9], torch.ones(model.shape.d_model), mode="add")
    >>> logits = engine.patch(model, "Q: hot\\nA:", [steered, engine.Patch("mlp_out", [10], 0.0, mode="scale")])
    """

    site: Site
    units: Units
    values: Values | float | int
    positions: Positions = -1
    mode: Mode = "replace"


@dataclass(frozen=True, eq=False)
class Knockout:
    """Tokens that do not attend to other tokens, the softmax taken over what is left.

    heads:     as the units of z: Bool[R, L, H], Bool[L, H] or (layer, head) pairs; None: all heads of all layers.
    keys:      tokens that are not seen, negative ones counted from the end of the prompt; or a list of such a row.
    positions: tokens that do not see them. Default: the last.

    Source: attention knockout (arXiv 2304.14767), section 4.

    >>> logits = engine.patch(model, "Q: hot\\nA:", engine.Knockout(None, [[0], [1, 2]]))
    >>> len(logits)
    2
    """

    heads: Heads
    keys: Sequence[Integer] | Sequence[Sequence[Integer]] | Tensor | np.ndarray
    positions: Positions = -1


@dataclass(frozen=True, eq=False)
class Edit:
    """A function in place of values: what no record says.

    site, positions: as for `Patch`. layers: those whose activations it is given. rows: how many there are.
    function: function(layer, x) -> x of the same shape, x [rows, positions, units, width] being its own. Rows may come
              in parts and with those of other prompts: it must treat rows alike, and tokens one by one, to be exact.

    Gradients of the values of patches beside it go through it.

    >>> logits = engine.patch(model, "Q: hot\\nA:", engine.Edit("mlp_out", [3, 4], lambda layer, x: x.clamp(-1, 1)))
    """

    site: Site
    layers: Sequence[Integer]
    function: Callable[[int, Tensor], Tensor]
    rows: Integer = 1
    positions: Positions = -1


One: TypeAlias = "Patch | Knockout | Edit"


@dataclass(frozen=True, eq=False)
class Change:
    """One patch, read: what it does, in tensors, to each of R rows.

    given:     the patch. site: where it acts (a knockout: at the scores).
    units:     mask of the units it acts on.
    positions: its tokens. values: Float[R or 1, P or 1, L, U, W] of a `Patch`, each axis
               1 where it is for all.
    keys:      of a knockout, the tokens of each row that are not seen.
    """

    given: One
    site: Site
    units: Bool[Tensor, "rows layers units"]
    positions: tuple[int, ...]
    values: Float[Tensor, "rows_or_1 positions_or_1 layers_or_1 units_or_1 width_or_1"] | None = None
    keys: tuple[tuple[int, ...], ...] = ()

    @property
    def mode(self) -> Mode:
        return self.given.mode if isinstance(self.given, Patch) else "replace"

    def select(self, rows: Sequence[int | None]) -> Change:
        """These rows, in this order; None: one that nothing is done to."""
        index = torch.tensor([row or 0 for row in rows], dtype=torch.long)
        units = self.units[index.to(self.units.device)]
        if None in rows:
            units[[i for i, row in enumerate(rows) if row is None]] = False
        values = self.values
        if values is not None and len(values) > 1:
            values = values[index.to(values.device)]
        keys = tuple(self.keys[row or 0] for row in rows) if self.keys else ()
        return replace(self, units=units, values=values, keys=keys)

    def at(self, n_tokens: int) -> list[int]:
        """The token of each position in a prompt of so many. Raises IndexError for one outside it."""
        if outside := [p for p in self.positions if not -n_tokens <= p < n_tokens]:
            raise IndexError(f"position {outside[0]} lies outside the prompt, which has {n_tokens} tokens")
        return [p % n_tokens for p in self.positions]


@dataclass(frozen=True)
class Patches:
    """All that is done to R rows of a prompt, in order."""

    each: tuple[Change, ...]
    n_rows: int
    n_layers: int

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset(change.site for change in self.each)

    @property
    def by_prompt(self) -> bool:
        """Whether rows of several prompts cannot share a pass: their attention is over tokens of each."""
        return not self.sites.isdisjoint(("scores", "pattern"))

    @property
    def requires_grad(self) -> bool:
        return any(change.values is not None and change.values.requires_grad for change in self.each)

    def rows(self, start: int, stop: int) -> Patches:
        """Some of the rows."""
        return self.select(range(self.n_rows)[start:stop])

    def select(self, rows: Sequence[int | None]) -> Patches:
        """These rows, in this order; None: one that nothing is done to."""
        return Patches(tuple(change.select(rows) for change in self.each), len(rows), self.n_layers)

    def first_layers(self) -> list[int]:
        """The first layer at which anything is done to each row; the last for a row that nothing is done to."""
        layers = torch.zeros(self.n_rows, self.n_layers, dtype=torch.bool)
        for change in self.each:
            layers |= change.units.any(dim=2).cpu()
        last = self.n_layers - 1
        return torch.where(layers.any(dim=1), layers.int().argmax(dim=1), last).tolist()

    def at(self, n_tokens: int) -> tuple[int, ...]:
        """The patched tokens of a prompt of so many, in order. Raises IndexError for a position outside it."""
        return tuple(sorted({at for change in self.each for at in change.at(n_tokens)}))

    def check(self, n_tokens: int, answer: int = 0) -> tuple[int, ...]:
        """`at`, and ValueError for what cannot be done to a prompt of so many tokens, the last being of its answer."""
        found = self.at(n_tokens)
        for change in self.each:
            at = change.at(n_tokens)
            if change.values is not None and change.values.shape[1] > 1 and len(set(at)) < len(at):
                raise ValueError(f"positions {list(change.positions)} are the same token twice, with values of its own")
            if change.values is not None and change.site in ("scores", "pattern"):
                _check_pattern(change, at, n_tokens - answer)
            for row, keys in enumerate(change.keys):
                _check_keys(row, keys, at, n_tokens)
        if len(outs := [change for change in self.each if change.keys]) > 1:
            _check_together(outs, n_tokens)
        return found


def _check_together(outs: Sequence[Change], n_tokens: int) -> None:
    """Raises ValueError if several knockouts leave a token nothing."""
    for row in range(len(outs[0].units)):
        for token in {token for change in outs for token in change.at(n_tokens)}:
            gone = torch.zeros(*outs[0].units.shape[1:], token + 1, dtype=torch.bool)  # [L, H, keys]
            for change in outs:
                if token in change.at(n_tokens):
                    gone[..., [key % n_tokens for key in change.keys[row]]] |= change.units[row].cpu()[..., None]
            if gone.all(dim=-1).any():
                raise ValueError(
                    f"row {row} knocks out all {token + 1} tokens that token {token} sees: nothing is left"
                )


def _check_pattern(change: Change, at: Sequence[int], n_tokens: int) -> None:
    values: Any = change.values
    if values.ndim and values.shape[-1] not in (1, n_tokens):
        raise ValueError(f"values of {change.site} must be of each of {n_tokens} tokens, got {values.shape[-1]}")
    if change.mode != "replace" or change.site != "pattern":
        return
    for p, token in enumerate(at):
        after = values[:, min(p, values.shape[1] - 1), ..., token + 1 :].detach().ne(0).any(dim=-1)  # [R or 1, L, U]
        if (after & change.units.to(after.device)).any():
            raise ValueError(f"a pattern of token {token} must be 0 for the tokens after it, which it does not see")


def _check_keys(row: int, keys: Sequence[int], at: Sequence[int], n_tokens: int) -> None:
    if outside := [key for key in keys if not -n_tokens <= key < n_tokens]:
        raise IndexError(f"key {outside[0]} of row {row} lies outside the prompt, which has {n_tokens} tokens")
    out = {key % n_tokens for key in keys}
    for token in at:
        if later := sorted(key for key in out if key > token):
            raise ValueError(f"key {later[0]} of row {row} comes after token {token}, which does not see it anyway")
        if out >= set(range(token + 1)):
            raise ValueError(f"row {row} knocks out all {token + 1} tokens that token {token} sees: nothing is left")


def no_patch(n_layers: int, rows: int = 1, positions: tuple[int, ...] = (-1,)) -> Patches:
    """Nothing, at these positions: they say where rows begin."""
    nothing = Patch("z", (), None)
    units = torch.zeros(rows, n_layers, 1, dtype=torch.bool)
    return Patches((Change(nothing, "z", units, positions),), rows, n_layers)
