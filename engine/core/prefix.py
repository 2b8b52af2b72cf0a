"""Prefixes: the tokens no row changes, computed once and used again."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from engine.core.capabilities import known
from engine.core.patches import Patches, Positions, no_patch
from engine.core.reading import check_model, read_positions
from models import Capabilities, Encoded, KeyValues, Model, PromptLike, UnsupportedModelError
from models.reading import as_int
from models.shapes import Int

GROUP_TOKENS = 1024  # of the neighbours in a pool that are computed together


@dataclass(frozen=True)
class Prefix:
    """A prompt whose first tokens are computed: `engine.patch(model, prefix, ...)` pays for the rest only.

    prompt: the whole prompt.
    cache:  unpatched keys and values of its first `len(cache)` tokens; never written to.
    model:  the model that computed them; other models refuse the prefix.
    state:  that the model was in; in another one, the prefix is computed again.
    places: how many last tokens logits are read at: of a prompt with an answer behind it, one for each of its tokens.
    """

    prompt: Encoded
    cache: KeyValues
    model: Model
    state: Hashable = None
    places: int = 1

    @property
    def tokens(self) -> Int[Tensor, " tokens"]:
        """Of the whole prompt."""
        return self.prompt.ids

    @property
    def nbytes(self) -> int:
        """Of the keys and values."""
        return self.cache.nbytes

    def __copy__(self) -> Prefix:
        return self

    def __deepcopy__(self, _: Any) -> Prefix:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a prefix belongs to its model and is not pickled: pickle the prompt, and prefill again")


# One prompt, or several as a list.
Prompts: TypeAlias = "PromptLike | Prefix | Sequence[PromptLike | Prefix]"


def as_prefix(model: Model, prompt: PromptLike | Prefix) -> Prefix:
    """A prompt encoded, nothing of it computed yet; or a prefix that is this model's own."""
    check_model(model)
    if not isinstance(prompt, Prefix):
        return Prefix(model.read(prompt), KeyValues(), model)
    if prompt.model is not model:
        raise ValueError(f"the prefix was computed by {prompt.model!r}, it cannot be used with {model!r}")
    if len(prompt.cache) and prompt.state != model.state():
        changed = "has changed since a prefix was computed (modules, weights, hooks, attention)"
        warnings.warn(f"{model.name} {changed}: it is computed again", stacklevel=4)
        return replace(prompt, cache=KeyValues(), state=None)
    return prompt


def as_prefixes(model: Model, prompt: Prompts) -> tuple[bool, list[Prefix]]:
    """Whether several prompts were given (a list of integers is one prompt), and each of them encoded."""
    if type(prompt) in (list, tuple) and None in map(as_int, prompt):  # type: ignore[arg-type]
        return True, [as_prefix(model, one) for one in prompt]  # type: ignore[arg-type,union-attr]
    return False, [as_prefix(model, prompt)]  # type: ignore[arg-type]


def prefill(model: Model, prompt: PromptLike, positions: Positions = -1) -> Prefix:
    """Compute a prompt up to the first of `positions` (default: all but its last token), to be patched many times.

    Raises ValueError for an empty or too long prompt, IndexError for a position outside it.

    >>> prefix = engine.prefill(model, "Q: hot\\nA:")
    >>> len(prefix.tokens) - len(prefix.cache)
    1
    """
    whole = as_prefix(model, prompt)
    first = no_patch(1, positions=read_positions(positions)).at(len(whole.tokens))[0]
    refuse_split(whole, first, known(model, bool(whole.prompt.inputs)).can)
    from engine.core.checking import able  # which runs prefixes

    refuse_split(whole, first, able(model, [whole])[0])
    return compute([whole], [first])[0]


@torch.no_grad()
def compute(prompts: Sequence[Prefix], lengths: Sequence[int]) -> list[Prefix]:
    """The prompts with at least their first `lengths` tokens computed, together where the model packs.

    Raises UnsupportedModelError if the model's prompts cannot be split there.
    """
    missing = [i for i, (p, length) in enumerate(zip(prompts, lengths, strict=True)) if length > len(p.cache)]
    if not missing:
        return list(prompts)
    model = prompts[0].model
    packed = True
    for i in missing:
        found = known(model, bool(prompts[i].prompt.inputs))
        refuse_split(prompts[i], lengths[i], found.can)
        packed = packed and not found.can.packed
    caches = model.prefill([prompts[i].prompt for i in missing], [lengths[i] for i in missing], packed)
    ready = dict(zip(missing, caches, strict=True))
    return [replace(p, cache=ready[i], state=found.state) if i in ready else p for i, p in enumerate(prompts)]


def refuse_split(prompt: Prefix, split: int, can: Capabilities) -> None:
    """Raises UnsupportedModelError if the prompt's first `split` tokens cannot be computed once for all rows."""
    if refused := (can.shared(len(prompt.tokens)) or why_not_split(prompt.prompt, split)) if split else "":
        raise UnsupportedModelError(f"no prefix of this prompt can be shared on {prompt.model.name}: {refused}")


def patched_positions(patch: Patches, prompt: Prefix) -> tuple[int, ...]:
    """`patch.check` for this prompt, less its answer. Raises IndexError outside it, ValueError on an image token."""
    positions, images = patch.check(len(prompt.tokens), prompt.places - 1), prompt.prompt.image_tokens
    if images is not None:
        hit = [p for p in positions if images[p]]
        if hit:
            raise ValueError(f"position {hit[0]} of the prompt is an image token: patch the text around the images")
    return positions


def why_not_split(prompt: Encoded, split: int) -> str:
    """Why rows cannot begin at this token; empty if they can."""
    if split < prompt.free_from:
        return f"an image follows: it has image tokens up to {prompt.free_from - 1}, rows would begin at {split}"
    return ""


def shareable(prompt: Prefix, split: int) -> int:
    """`split`, or 0 if nothing of the prompt can be shared up to there."""
    can = known(prompt.model, bool(prompt.prompt.inputs)).can
    return 0 if can.shared(len(prompt.tokens)) or why_not_split(prompt.prompt, split) else split


class PrefixPool:
    """Prefixes of a fixed list of prompts, all but the last token, computed when first needed and kept within a budget.

    Prompts are computed in fixed groups of neighbours, so that a prefix has the same bits whichever was asked for
    first, and again after it was dropped; the group unused for longest is dropped when the budget is exceeded.
    """

    def __init__(self, model: Model, prompts: Sequence[PromptLike], budget: int = 2 * 2**30):
        self.model = model
        self.budget = budget
        self.prompts = [as_prefix(model, prompt) for prompt in prompts]
        self._group_of: list[int] = []
        self._groups: list[list[int]] = []
        size = 0
        for index, one in enumerate(self.prompts):
            size += len(one.tokens)
            if not self._groups or size > GROUP_TOKENS:
                self._groups.append([])
                size = len(one.tokens)
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
        if group in self._ready and self._ready[group][0].state not in (None, self.model.state()):
            self._ready.clear()  # the model has changed
        if group not in self._ready:
            prompts = [self.prompts[i] for i in self._groups[group]]
            splits = [shareable(prompt, len(prompt.tokens) - 1) for prompt in prompts]
            self._ready[group] = compute(prompts, splits)
            while self.nbytes > self.budget and len(self._ready) > 1:
                self._ready.popitem(last=False)
        self._ready.move_to_end(group)
        return self._ready[group][index - self._groups[group][0]]
