"""Prefixes: the tokens no row changes, computed once and used again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from engine.intervention import read_patch
from models import KeyValues, Model, PromptLike
from models.shapes import Int

GROUP_TOKENS = 1024  # of the neighbours in a pool that are computed together


@dataclass(frozen=True)
class Prefix:
    """A prompt whose first tokens are computed: `engine.patch(model, prefix, ...)` pays for the rest only.

    tokens: the whole prompt.
    cache:  unpatched keys and values of its first `len(cache)` tokens; never written to.
    model:  the model that computed them; other models refuse the prefix.
    """

    tokens: Int[Tensor, " tokens"]
    cache: KeyValues
    model: Model

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes


# One prompt, or several as a list.
Prompts: TypeAlias = "PromptLike | Prefix | Sequence[PromptLike | Prefix]"


def as_prefix(model: Model, prompt: PromptLike | Prefix) -> Prefix:
    """A prompt encoded, nothing of it computed yet; or a prefix that is this model's own."""
    if not isinstance(prompt, Prefix):
        return Prefix(model.encode(prompt), KeyValues(), model)
    if prompt.model is not model:
        raise ValueError(f"the prefix was computed by {prompt.model!r}, it cannot be used with {model!r}")
    return prompt


def as_prefixes(model: Model, prompt: Prompts) -> tuple[bool, list[Prefix]]:
    """Whether several prompts were given (a list of integers is one prompt), and each of them encoded."""
    if isinstance(prompt, (list, tuple)) and not all(isinstance(token, int) for token in prompt):
        return True, [as_prefix(model, one) for one in prompt]
    return False, [as_prefix(model, prompt)]  # type: ignore[arg-type]


def prefill(model: Model, prompt: PromptLike, positions: int | Sequence[int] = -1) -> Prefix:
    """Compute a prompt up to the first of `positions` (default: all but its last token), to be patched many times.

    Raises ValueError for an empty or too long prompt, IndexError for a position outside it.

    >>> prefix = engine.prefill(model, "Q: hot\\nA:")
    >>> len(prefix.tokens) - len(prefix.cache)
    1
    """
    tokens = model.encode(prompt)
    first = read_patch(model.shape, None, None, positions).at(len(tokens))[0]
    return compute(model, [tokens], [first])[0]


@torch.no_grad()
def compute(model: Model, prompts: Sequence[Tensor], lengths: Sequence[int]) -> list[Prefix]:
    """Prefixes of the first `lengths` tokens of each prompt, in one pass where the model packs."""
    some = [i for i, length in enumerate(lengths) if length]
    caches = iter(model.prefill([prompts[i][: lengths[i]] for i in some]) if some else [])
    return [
        Prefix(p, next(caches) if length else KeyValues(), model) for p, length in zip(prompts, lengths, strict=True)
    ]


class PrefixPool:
    """Prefixes of a fixed list of prompts, all but the last token, computed when first needed and kept within a budget.

    Prompts are computed in fixed groups of neighbours, so that a prefix has the same bits whichever was asked for
    first, and again after it was dropped; the group unused for longest is dropped when the budget is exceeded.
    """

    def __init__(self, model: Model, prompts: Sequence[PromptLike], budget: int = 2 * 2**30):
        self.model = model
        self.budget = budget
        self.prompts = [model.encode(prompt) for prompt in prompts]
        self._group_of: list[int] = []
        self._groups: list[list[int]] = []
        size = 0
        for index, tokens in enumerate(self.prompts):
            size += len(tokens)
            if not self._groups or size > GROUP_TOKENS:
                self._groups.append([])
                size = len(tokens)
            self._groups[-1].append(index)
            self._group_of.append(len(self._groups) - 1)
        self._ready: OrderedDict[int, list[Prefix]] = OrderedDict()

    @property
    def nbytes(self) -> int:
        return sum(prefix.nbytes for group in self._ready.values() for prefix in group)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prefix:
        group = self._group_of[index]
        if group not in self._ready:
            prompts = [self.prompts[i] for i in self._groups[group]]
            self._ready[group] = compute(self.model, prompts, [len(p) - 1 for p in prompts])
            while self.nbytes > self.budget and len(self._ready) > 1:
                self._ready.popitem(last=False)
        self._ready.move_to_end(group)
        return self._ready[group][index - self._groups[group][0]]
