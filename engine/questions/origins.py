"""What is patched in: values that are given, an ablation, or the activations of another prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from engine.core.patches import Mode
from engine.core.prefix import Prefix, as_prefix
from engine.core.reading import read_means, read_mode
from engine.distributed import digest
from engine.questions.where import Where, check_pair, computed, same_length
from models import PromptLike
from models.reading import read_seed, read_tensor
from models.shapes import Float, Integer

Ablation: TypeAlias = Literal["zero", "mean", "resample"]


@dataclass(frozen=True, eq=False)
class Origin:
    """Where the values come from that are patched into each prompt.

    prompts: what is patched. where: activations are taken, at which site.
    values:  one set for all prompts, [L, U, W], or one a prompt; or an ablation. None: sources say what is patched in.
    sources: a prompt for each prompt, or none.
    mode:    "replace" what is there, or "add" to it. seed: of "resample".
    """

    prompts: list[Prefix]
    where: Where
    values: Tensor | Ablation | None
    sources: list[Prefix]
    mode: Mode
    seed: int

    @torch.no_grad()
    def into(self, n: int) -> tuple[Float[Tensor, "spots tokens layers units width"], Prefix | None]:
        """What is patched into prompt n at each spot; and the prompt it came from, if a source."""
        if self.sources:
            last = max(at for spot in self.where.at(n, len(self.sources[n].tokens)) for at in spot)
            whole = computed(self.sources[n], last)
            return self.where.activations(n, whole), whole
        if isinstance(self.values, Tensor):
            one = self.values[n] if self.values.ndim == 4 else self.values
            return one.expand(*self._spots(n), *one.shape), None
        if self.values == "resample":
            other = self.partners[n]
            return self.where.activations(other, self.prompts[other]), None
        if self.values == "mean":
            return self.means, None
        size = self.prompts[n].model.site(self.where.site)
        return torch.zeros(1, 1, size.n_layers, size.units, size.width).expand(*self._spots(n), -1, -1, -1), None

    def _spots(self, n: int) -> tuple[int, int]:
        return len(self.where.spots[n]), len(self.where.spots[n][0])

    @cached_property
    def means(self) -> Float[Tensor, "spots tokens layers units width"]:
        """Of the prompts' own activations; summed in float64."""
        each = (self.where.activations(n, prompt).double() for n, prompt in enumerate(self.prompts))
        total = reduce(torch.add, each)
        return (total / len(self.prompts)).to(torch.promote_types(self.prompts[0].model.dtype, torch.float32))

    @cached_property
    def partners(self) -> dict[int, int]:
        """For each prompt another, whose activations are taken: steps along a cycle through all of them."""
        random, size = torch.Generator().manual_seed(self.seed), len(self.prompts)
        order, turn = torch.randperm(size, generator=random), torch.randint(1, size, (), generator=random)
        return dict(zip(order.tolist(), order.roll(int(turn)).tolist(), strict=True))

    @property
    def described(self) -> str:
        """Different for different values."""
        if isinstance(self.values, Tensor):
            return f"given, {digest(self.values)}"
        return f"resample, seed {self.seed}" if self.values == "resample" else self.values or "source"


def read_origin(
    prompts: list[Prefix],
    where: Where,
    values: Tensor | np.ndarray | Ablation | None,
    source: Sequence[PromptLike] | None,
    mode: Mode = "replace",
    seed: Integer = 0,
) -> Origin:
    """Raises ValueError or TypeError for neither or both of values and source, and for either that does not fit."""
    model = prompts[0].model
    given: Any = read_tensor(values, "values")
    read_mode(mode)
    sources = _read_sources(prompts, source, where)
    if (source is None) == (values is None):
        raise ValueError("expected either values or source, what is patched in")
    if mode != "replace" and not isinstance(given, Tensor):
        raise ValueError(
            f"mode {mode!r} takes a tensor of values, got {'a source' if values is None else repr(values)}"
        )
    if isinstance(given, Tensor):
        if given.ndim == 4 and len(given) != len(prompts):
            raise ValueError(f"values must be one set, or one for each of {len(prompts)} prompts: got {len(given)}")
        for some in given if given.ndim == 4 else [given]:
            read_means(model, some, where.site)
    elif given is not None and given not in get_args(Ablation):
        raise ValueError(f"values must be a tensor or one of {get_args(Ablation)}, got {values!r:.80}")
    elif given == "resample" and len(prompts) < 2:
        raise ValueError("'resample' takes activations of another prompt: give two at least")
    elif given == "zero" and where.site == "pattern":
        raise ValueError("a pattern of zeros is none: engine.sweep_knockout keeps tokens from seeing others")
    elif given in ("mean", "resample") and (where.site == "pattern" or len(where.spots[0][0]) > 1):
        same_length([len(prompt.tokens) for prompt in prompts], f"with {given!r} of {where.described} at {where.site}")
    return Origin(prompts, where, given, sources, mode, read_seed(seed))


def _read_sources(prompts: Sequence[Prefix], source: Sequence[PromptLike] | None, where: Where) -> list[Prefix]:
    if source is None:
        return []
    if isinstance(source, str) or not isinstance(source, Sequence) or len(source) != len(prompts):
        raise ValueError(f"source must be a prompt for each of {len(prompts)} prompts, got {source!r:.80}")
    sources = [as_prefix(prompts[0].model, one) for one in source]
    for n, (one, other) in enumerate(zip(prompts, sources, strict=True)):
        if not where.only_last or where.site == "pattern":
            check_pair(n, one, other, f"at positions {where.described} of {where.site}")
    return sources
